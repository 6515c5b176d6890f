"""Normalisation of each sample over groups of its channels, fused with an affine map and an activation.

Instance, group and adaptive instance normalisation of M branches. Like :mod:`bsfast.ops.batch_norm` this is not closed
under differentiation: it runs in eager mode only, outside function transforms and forward mode, and its backward under
``create_graph`` differentiates the composition of stock operators.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast.layout import is_batch_last
from bsfast.ops import plan
from bsfast.ops.batch_norm import statistics_dtype
from bsfast.ops.composition import composed_grads, must_compose
from bsfast.ops.functorch import transforms_active


def plan_sample_norm(x: Tensor, *coefficients: Tensor | None) -> plan.Plan:
    """Say whether :func:`sample_norm` can take these operands, and why.

    Args:
        x: The activations.
        coefficients: Scale and shift, of its dtype or, one of a channel, of :func:`statistics_dtype`.

    Returns:
        Algorithm ``"native"``, or ``"aten"`` where the stock operators must run.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return plan.Plan("aten", "function transforms, forward mode and torch.compile go through stock operators")
    fit = (x.dtype, statistics_dtype(x.dtype))  # what each sample has of its own is computed in x's dtype
    if any(
        t.device != x.device or t.dtype not in fit[: 2 if t.dim() == 2 else 1] for t in coefficients if t is not None
    ):
        return plan.Plan("aten", "operands of different dtypes or devices")
    memory = "batch-last" if is_batch_last(x) else "contiguous" if x.is_contiguous() else "neither memory order"
    if x.dim() != 5:
        memory = "this shape"
    has_kernel = memory in {"batch-last", "contiguous"} and x.numel() > 0
    piece = "a group of channels"
    chosen = plan.norm(device=x.device.type, dtype=x.dtype, memory=memory, has_kernel=has_kernel, piece=piece)
    if any(type(t) not in {Tensor, torch.nn.Parameter, type(None)} for t in (x, *coefficients)):  # as in reports
        return plan.Plan("aten", "a tensor subclass goes through stock operators")
    return chosen


def sample_norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    num_groups: int,
    eps: float = 1e-5,
    negative_slope: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every group of channels of every sample: act(scale (x - mean) / sigma + shift).

    Mean and variance are over the channels of a group and space, as of ``F.group_norm``; with one channel a group, as
    of ``F.instance_norm``. Only for operands for which :func:`plan_sample_norm` says ``"native"``.

    Args:
        x: Shape ``(M, N, C, H, W)``.
        scale: Shape ``(M, C)``, or ``(M, N, C)`` for one a sample, or None for 1.
        shift: Likewise, or None for 0.
        num_groups: Groups of neighbouring channels; divides C.
        eps: Added to the variance.
        negative_slope: What the activation multiplies negative values by: 0 for ReLU, 1 for none.

    Returns:
        The result, shape and memory order of ``x``, and mean and variance (divided by the number of elements) of each
        group, ``(M, N, num_groups)`` in float64, both without gradients.

    Raises:
        ValueError: If a shape does not fit, ``num_groups`` does not divide C or the slope is negative.
    """
    if x.dim() != 5:
        raise ValueError(f"sample_norm: x must have shape (M, N, C, H, W), got {tuple(x.shape)}")
    branches, samples, channels = x.shape[:3]
    for name, given in (("scale", scale), ("shift", shift)):
        if given is not None and given.shape not in {(branches, channels), (branches, samples, channels)}:
            raise ValueError(
                f"sample_norm: {name} must have shape (M={branches}, C={channels}) or "
                f"(M={branches}, N={samples}, C={channels}), got {tuple(given.shape)}"
            )
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"sample_norm: num_groups must divide C={channels}, got {num_groups}")
    if negative_slope < 0:  # the sign of the result would not tell that of its argument
        raise ValueError(f"sample_norm: negative_slope must be at least 0, got {negative_slope}")
    result: tuple[Tensor, Tensor, Tensor] = _SampleNorm.apply(x, scale, shift, num_groups, eps, negative_slope)  # type: ignore[no-untyped-call]
    return result


def composite(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, num_groups: int, eps: float, negative_slope: float
) -> Tensor:
    """The same result by stock operators, differentiable any number of times."""
    y = torch.group_norm(x.flatten(0, 1), num_groups, eps=eps).view(x.shape)
    shape = (len(x), -1, x.shape[2], 1, 1)
    scale, shift = (None if t is None else t.reshape(shape) for t in (scale, shift))
    y = y if scale is None else y * scale
    y = (y if shift is None else y + shift).to(x.dtype)
    return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)


class _SampleNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        num_groups: int,
        eps: float,
        negative_slope: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        mean, inv, variance = (_empty_per_sample(x, num_groups, torch.float64) for _ in range(3))
        own = [_in_order_of(x, t) for t in (scale, shift)]
        torch.ops.bsfast.sample_norm_out(x, *own, y, mean, inv, variance, num_groups, eps, negative_slope)
        ctx.save_for_backward(x, scale, shift, None if negative_slope == 1 else y, mean, inv)
        ctx.settings = (num_groups, eps, negative_slope)
        mean, variance = (_logical(x, t) for t in (mean, variance))
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, scale, shift, y, mean, inv = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if must_compose(grad):
            own = composed_grads(lambda *operands: composite(*operands, *ctx.settings), (x, scale, shift), needs, grad)
            return (*own, None, None, None)
        num_groups, _eps, negative_slope = ctx.settings
        same = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
        x_grad = torch.empty_like(x)
        scale_grad, shift_grad = (_empty_per_sample(x, x.shape[2], statistics_dtype(x.dtype)) for _ in range(2))
        torch.ops.bsfast.sample_norm_grad_out(
            x,
            x if y is None else y,
            same,
            _in_order_of(x, scale),
            mean,
            inv,
            x_grad,
            scale_grad,
            shift_grad,
            num_groups,
            negative_slope,
        )
        grads = [x_grad, *(_logical(x, t) for t in (scale_grad, shift_grad))]
        for i, own in ((1, scale), (2, shift)):
            if needs[i] and own is not None and own.dim() == 2:
                grads[i] = grads[i].sum(1)
        return (*(own if needed else None for own, needed in zip(grads, needs, strict=True)), None, None, None)


def _empty_per_sample(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Memory for ``count`` values a sample, as the kernels want it: their samples are where those of x are."""
    branches, samples = x.shape[:2]
    shape = (branches, count, samples) if is_batch_last(x) else (branches, samples, count)
    return torch.empty(shape, dtype=dtype, device=x.device)


def _logical(x: Tensor, values: Tensor) -> Tensor:
    """View such values as ``(M, N, count)``."""
    return values.mT if is_batch_last(x) else values


def _in_order_of(x: Tensor, values: Tensor | None) -> Tensor | None:
    """Coefficients ``(M, C)`` or ``(M, N, C)`` as the kernels want them."""
    if values is None or values.dim() == 2:
        return values if values is None else values.contiguous()
    return _logical(x, values).contiguous()
