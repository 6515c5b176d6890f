"""Batch normalisation of M branches with the statistics of the batch, fused with a residual sum and a ReLU.

Unlike the convolutions this is not closed under differentiation. It runs in eager mode, outside function transforms and
forward mode; its backward under ``create_graph``, or of several gradients at once, is that of the composition of stock
operators.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast.layout import is_batch_last
from bsfast.ops import plan
from bsfast.ops.composition import composed_grads, must_compose
from bsfast.ops.functorch import transforms_active

_MEMORY_ORDERS = ("batch-last", "contiguous")


def plan_batch_norm(x: Tensor, *operands: Tensor | None) -> plan.Plan:
    """Say whether :func:`batch_norm` can take these operands, and why.

    Args:
        x: The activations.
        operands: The others: weight and bias, of their dtype or of :func:`statistics_dtype`, and residual.

    Returns:
        Algorithm ``"native"``, or ``"aten"`` where the stock operators must run.
    """
    present = [t for t in operands if t is not None]
    if torch.compiler.is_compiling() or transforms_active():
        return plan.Plan("aten", "function transforms, forward mode and torch.compile go through stock operators")
    fit = (x.dtype, statistics_dtype(x.dtype))
    if any(t.device != x.device or t.dtype not in fit[: 1 if t.dim() == 5 else 2] for t in present):
        return plan.Plan("aten", "operands of different dtypes or devices")
    memory = "batch-last" if is_batch_last(x) else "contiguous" if x.is_contiguous() else "neither memory order"
    if x.dim() != 5 or any(t.dim() == 5 and t.stride() != x.stride() for t in present):
        memory = "this shape, or operands of different memory orders,"
    has_kernel = memory in _MEMORY_ORDERS and x.numel() > 0
    return plan.norm(device=x.device.type, dtype=x.dtype, memory=memory, has_kernel=has_kernel, piece="a channel")


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel of every branch: act(weight (x - mean) / sigma + bias + residual).

    Mean and variance are over samples and space, as of ``F.batch_norm(..., training=True)`` of each branch. Only for
    operands for which :func:`plan_batch_norm` says ``"native"``.

    Args:
        x: Shape ``(M, N, C, H, W)``.
        weight: Shape ``(M, C)``, or None for 1.
        bias: Shape ``(M, C)``, or None for 0.
        eps: Added to the variance.
        residual: Added before the activation; shape and memory order of ``x``.
        relu: Whether the activation is a ReLU, or there is none.
        moments: Mean and variance as returned, if they are known.

    Returns:
        The result, shape of ``x``, and mean and variance (divided by the number of elements) of the batch, ``(M, C)``,
        both without gradients and of :func:`statistics_dtype`.
    """
    result: tuple[Tensor, Tensor, Tensor] = _BatchNorm.apply(x, weight, bias, residual, eps, relu, moments)  # type: ignore[no-untyped-call]
    return result


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the statistics and coefficients of activations: float32 where these have 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def composite(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """The same result by stock operators, differentiable any number of times."""
    scale, shift = (None if t is None else t.reshape(-1) for t in (weight, bias))
    rows = x.movedim(1, -1)  # (M, C, H, W, N), in memory as it is here where x is batch-last
    merged = rows.reshape(1, -1, rows[0, 0].numel())
    y = F.batch_norm(merged, None, None, scale, shift, True, 0.0, eps).view(rows.shape).movedim(-1, 1)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        relu: bool,
        moments: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        sizes, dtype = (x.shape[0], x.shape[2]), statistics_dtype(x.dtype)
        scale, shift, inv, *own = (x.new_empty(sizes, dtype=dtype) for _ in range(3 if moments else 5))
        (mean, variance), coefficients = moments or own, (scale, shift, inv)
        flat = [None if t is None else t.contiguous() for t in (weight, bias)]
        torch.ops.bsfast.batch_norm_out(
            x, *flat, residual, y, mean, variance, *coefficients, eps, relu, moments is not None
        )
        # The gradient's mask is that of y, which is computed again where it is x's alone.
        kept = (residual, y) if relu and residual is not None else (None, None)
        ctx.save_for_backward(x, weight, bias, *kept, mean, *coefficients)
        ctx.eps, ctx.relu = eps, relu
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, y, mean, *coefficients = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if must_compose(grad):
            compose = partial(composite, eps=ctx.eps, relu=ctx.relu)
            *own, last = composed_grads(compose, (x, weight, bias, residual), needs, grad)
            # Without a ReLU the residual's gradient is the result's, and the residual was not kept.
            return (*own, grad if needs[3] and residual is None else last, None, None, None)
        same = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
        x_grad, weight_grad, bias_grad = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
        residual_grad = torch.empty_like(x) if residual is not None and needs[3] else None
        torch.ops.bsfast.batch_norm_grad_out(
            x, y, same, mean, *coefficients, x_grad, weight_grad, bias_grad, residual_grad, ctx.relu
        )
        grads = (x_grad, weight_grad, bias_grad, same if residual is None else residual_grad)
        return (*(own if needed else None for own, needed in zip(grads, needs, strict=True)), None, None, None)
