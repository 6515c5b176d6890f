"""Products of all rows of a matrix with each other, of which one half is computed and the other is its mirror image."""

import torch
from torch import Tensor

from bsfast.ops import plan
from bsfast.ops.backend import kernel_why_not
from bsfast.ops.functorch import has_memory, transforms_active

_PANEL = 256  # rows
_FEW = 1024  # rows, of which stock products leave a GPU idle or compute both halves; not measured on hardware yet


def plan_gram(x: Tensor, weights: Tensor | None = None) -> plan.Plan:
    """Say how :func:`gram` computes the products of these rows, and why."""
    given = [x] if weights is None else [x, weights]
    if torch.compiler.is_compiling() or transforms_active() or not all(map(has_memory, given)):
        return plan.Plan("composite", "function transforms and torch.compile go through stock operators, both halves")
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return plan.Plan("composite", "a result to be differentiated is of stock operators, both halves")
    if why_not := kernel_why_not("gram", x.device.type, x.dtype):
        return plan.Plan("aten", why_not)
    if x.dtype != torch.float32:
        return plan.Plan("aten", f"{x.dtype} has no own kernel")
    if x.shape[1] > _FEW:
        return plan.Plan("aten", f"more than {_FEW} rows: stock products of panels skip one half, too")
    return plan.Plan("native", "Triton kernel, whose programs own tiles on and above the diagonal")


def gram(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute x diag(weights) x^T of each matrix.

    The own kernel multiplies and sums in float32, never in TF32; stock operators follow torch's settings.

    Args:
        x: Shape ``(B, R, K)``.
        weights: Shape ``(K,)``, dtype and device of ``x``, or None for 1.

    Returns:
        Shape ``(B, R, R)``, symmetric up to rounding.

    Raises:
        ValueError: If a shape, dtype or device does not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"gram: x must have shape (B, R, K), got {tuple(x.shape)}")
    if weights is not None:
        if weights.shape != x.shape[2:]:
            raise ValueError(f"gram: weights must have shape (K={x.shape[2]},), got {tuple(weights.shape)}")
        if (weights.dtype, weights.device) != (x.dtype, x.device):
            raise ValueError(
                f"gram: weights must have the dtype and device of x, {x.dtype} and {x.device}, got {weights.dtype} and "
                f"{weights.device}"
            )
    algorithm = plan_gram(x, weights).algorithm
    if algorithm == "native":
        return launch(x, weights)
    weighted = x if weights is None else x * weights
    return weighted @ x.mT if algorithm == "composite" else _by_panels(weighted, x)


def launch(x: Tensor, weights: Tensor | None) -> Tensor:
    """Run the own kernel, whatever the plan."""
    out = x.new_empty(len(x), x.shape[1], x.shape[1])
    torch.ops.bsfast.gram_out(x.contiguous(), None if weights is None else weights.contiguous(), out)
    return out


def _by_panels(weighted: Tensor, x: Tensor) -> Tensor:
    """Multiply some rows by themselves and those below at a time: torch has no product of which half is computed."""
    count, rows, _ = x.shape
    if rows <= _PANEL:
        return torch.bmm(weighted, x.mT)
    out = x.new_empty(count, rows, rows)
    for own, left, right in zip(out, x, weighted, strict=True):
        for first in range(0, rows, _PANEL):
            last = first + _PANEL
            torch.mm(left[first:last], right[first:].mT, out=own[first:last, first:])
            own[last:, first:last] = own[first:last, last:].mT
    return out
