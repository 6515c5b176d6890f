"""Convolution of M branches whose input may be a batch normalisation with a ReLU, computed while it is read.

The normalised activations are never in memory, nor kept for the backward: it computes them again from the values before
the normalisation. As :mod:`bsfast.ops.batch_norm` this is not closed under differentiation; it runs in eager mode,
outside function transforms, and its backward is that of the composition where that module's is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsfast.ops import conv2d_kernels, plan
from bsfast.ops.backend import kernel_why_not
from bsfast.ops.batch_norm import composite, plan_batch_norm, statistics_dtype
from bsfast.ops.bilinear import taken_dtype
from bsfast.ops.composition import composed_grads, must_compose
from bsfast.ops.conv2d import conv2d
from bsfast.ops.functorch import transforms_active

Moments = tuple[Tensor, Tensor]


class Norm(NamedTuple):
    """A batch normalisation with the statistics of the batch.

    Attributes:
        weight: Shape ``(M, C)``, or None for 1.
        bias: Shape ``(M, C)``, or None for 0.
        eps: Added to the variance.
        relu: Whether a ReLU follows.
        moments: Mean and variance (divided by the number of elements) of each channel, ``(M, C)``, if they are known.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool
    moments: Moments | None


class Convolved(NamedTuple):
    """Result of :func:`norm_conv2d`.

    Attributes:
        y: Shape ``(M, N, C_out, H_out, W_out)``.
        moments: Mean and variance of its channels, ``(M, C_out)``, without gradients.
        input_moments: Those of the input's channels, if it was normalised.
        x: The input for what else takes it: gradients of that are added to the convolution's as those are stored.
    """

    y: Tensor
    moments: Moments
    input_moments: Moments | None
    x: Tensor


def plan_norm_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any], norm: Norm | None
) -> plan.Plan:
    """Say whether :func:`norm_conv2d` can take these operands, and why.

    Args:
        x: The activations.
        weight: Of the convolution.
        bias: Of the convolution.
        geometry: Stride, padding, dilation, each a pair, and groups.
        norm: The normalisation before it.

    Returns:
        Algorithm ``"native"``, or ``"aten"`` where the parts must run one by one.
    """
    given = [bias] if norm is None else [bias, norm.weight, norm.bias]
    coefficients = [t for t in given if t is not None]
    if torch.compiler.is_compiling() or transforms_active():
        return plan.Plan("aten", "function transforms, forward mode and torch.compile take the parts")
    dtype = taken_dtype(x)
    same = taken_dtype(weight) == dtype and all(t.device == x.device for t in (weight, *coefficients))
    if not same or any(t.dtype not in {dtype, statistics_dtype(dtype)} for t in coefficients):
        return plan.Plan("aten", "operands of different dtypes or devices")
    if why_not := kernel_why_not("norm_conv2d", x.device.type, dtype):
        return plan.Plan("aten", why_not)
    if norm is not None and x.dtype != dtype:
        return plan.Plan("aten", f"autocast normalises {x.dtype} and convolves {dtype}")
    if norm is not None and (before := plan_batch_norm(x, norm.weight, norm.bias)).algorithm != "native":
        return before
    chosen = _plan_conv2d(x, weight, geometry)
    return chosen if chosen.algorithm == "native" else plan.Plan("aten", chosen.reason)


def norm_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any], norm: Norm | None = None
) -> Convolved:
    """Convolve every branch, after a normalisation if one is given, and describe the result.

    Only for operands for which :func:`plan_norm_conv2d` says ``"native"``. Under autocast x and weight are cast as a
    stock convolution's; statistics are float32 where activations have 16 bits, and so may bias and ``norm`` be.

    Args:
        x: Shape ``(M, N, C_in, H, W)``, or without a normalisation ``(N, C_in, H, W)`` if shared by all branches.
        weight: Shape ``(M, C_out, C_in / groups, kH, kW)``.
        bias: Shape ``(M, C_out)``, or None.
        geometry: Stride, padding, dilation, each a pair, and groups.
        norm: The normalisation of x.

    Returns:
        The result with its moments.
    """
    own, weight = x.to(taken_dtype(x)), weight.to(taken_dtype(weight))
    # A cast x is the convolution's alone.
    takes_more = x.requires_grad and own is x
    if norm is None:
        y, *moments, passed = _NormConv2d.apply(own, weight, bias, None, None, None, 0.0, False, tuple(geometry))  # type: ignore[no-untyped-call]
        return Convolved(y, (moments[0], moments[1]), None, passed if takes_more else x)
    mean, variance = norm.moments or (_of_channels(x, x.shape[0], x.shape[2]) for _ in range(2))
    operands = (own, weight, bias, norm.weight, norm.bias, (mean, variance, norm.moments is not None))
    y, *moments, passed = _NormConv2d.apply(*operands, norm.eps, norm.relu, tuple(geometry))  # type: ignore[no-untyped-call]
    return Convolved(y, (moments[0], moments[1]), (mean, variance), passed if takes_more else x)


def folded_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[Any],
    residual: Tensor | None,
    *,
    scale: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve every branch and store act(scale y + bias + residual) at once; without gradients.

    Args:
        x: As for :func:`norm_conv2d`, which must be ``"native"``; cast as there.
        weight: Shape ``(M, C_out, C_in / groups, kH, kW)``.
        scale: Shape ``(M, C_out)``, or None for 1.
        bias: Shape ``(M, C_out)``, or None for 0.
        geometry: Stride, padding, dilation, each a pair, and groups.
        residual: Shape of the result, or None.
        relu: Whether the activation is a ReLU, or there is none.
        mask: Shape of the result, or None; where it is at most 0, zero is stored.

    Returns:
        Shape ``(M, N, C_out, H_out, W_out)``.
    """
    x, weight = x.to(taken_dtype(x)), weight.to(taken_dtype(weight))
    beside = {"residual": residual, "mask": mask}
    after: dict[str, Any] = {
        name: None if other is None else conv2d_kernels.in_order_of(other, x) for name, other in beside.items()
    }
    after |= {"out_scale": _coefficient(scale, x), "bias": _coefficient(bias, x), "relu": relu}
    return conv2d_kernels.native_conv2d(x, weight, geometry, winograd=_plan_conv2d(x, weight, geometry).tile, **after)


def folded_input_grad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    geometry: Sequence[Any],
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Gradient of :func:`folded_conv2d` with respect to x, with another gradient added and a ReLU's derivative applied.

    Args:
        grad: Shape ``(M, N, C_out, H_out, W_out)``.
        weight: Shape ``(M, C_out, C_in / groups, kH, kW)``.
        x: Shape ``(M, N, C_in, H, W)``; only its shape and memory order matter.
        geometry: Stride, padding, dilation, each a pair, and groups.
        residual: Shape of x, or None.
        mask: Shape of x, or None; where it is at most 0, zero is stored.

    Returns:
        Shape of x; records no gradients.
    """
    grad = conv2d_kernels.in_order_of(grad, x)
    return conv2d_kernels.input_grad(grad, weight, x.shape, *geometry, residual=residual, mask=mask, like=x)


def folded_weight_grad(x: Tensor, grad: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    """Gradient of :func:`folded_conv2d` with respect to the weights, of which only the shape matters."""
    return conv2d_kernels.weight_grad(x, grad, (weight.shape[-2], weight.shape[-1]), *geometry)


def _plan_conv2d(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> plan.Plan:
    problem = conv2d_kernels.problem(x, x.shape, weight.shape, *geometry)
    return plan.conv2d(problem._replace(dtype=taken_dtype(x)))


def _of_channels(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=statistics_dtype(x.dtype))


def _coefficient(t: Tensor | None, x: Tensor) -> Tensor | None:
    """As the kernels take it for activations like x."""
    return None if t is None else t.to(statistics_dtype(x.dtype)).contiguous()


class _NormConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        statistics: tuple[Tensor, Tensor, bool] | None,
        eps: float,
        relu: bool,
        geometry: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        coefficients: list[Tensor] = []
        around: dict[str, Any] = {}
        if statistics is not None:
            mean, variance, known = statistics
            coefficients = [torch.empty_like(mean) for _ in range(3)]
            flat = [_coefficient(t, x) for t in (scale, shift)]
            torch.ops.bsfast.batch_norm_out(x, *flat, None, None, mean, variance, *coefficients, eps, relu, known)
            around = {"scale": coefficients[0], "shift": coefficients[1], "rectify": relu}
            coefficients = [mean, *coefficients]
        moments = [_of_channels(x, *weight.shape[:2]) for _ in range(2)]
        around["winograd"] = _plan_conv2d(x, weight, geometry).tile
        y = conv2d_kernels.native_conv2d(
            x, weight, geometry, **around, bias=_coefficient(bias, x), mean=moments[0], variance=moments[1]
        )
        ctx.save_for_backward(x, weight, bias, scale, shift, *coefficients)
        ctx.eps, ctx.relu, ctx.geometry = eps, relu, geometry
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        return y, moments[0], moments[1], x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        passed = others[-1]
        if grad is None:
            return (passed, *[None] * 8)
        x, weight, bias, scale, shift, *coefficients = ctx.saved_tensors
        needs, geometry = ctx.needs_input_grad[:5], ctx.geometry
        if must_compose(grad, passed):
            compose = partial(_composite, geometry=geometry, norm=(ctx.eps, ctx.relu) if coefficients else None)
            first, *rest = composed_grads(compose, (x, weight, bias, scale, shift), needs, grad)
            return (first if first is None or passed is None else first + passed, *rest, *[None] * 4)
        grads: list[Tensor | None] = [None] * 5
        grad = conv2d_kernels.in_order_of(grad, x)
        if needs[2]:
            grads[2] = grad.sum((1, 3, 4), dtype=bias.dtype)
        if needs[1]:
            around = {"scale": coefficients[1], "shift": coefficients[2], "rectify": ctx.relu} if coefficients else {}
            grads[1] = conv2d_kernels.weight_grad(x, grad, weight.shape[-2:], *geometry, **around)
        if needs[0] or needs[3] or needs[4]:
            added = None if coefficients else passed
            x_grad = conv2d_kernels.input_grad(grad, weight, x.shape, *geometry, residual=added, like=x)
            grads[0] = x_grad
            if coefficients:
                scale_grad, shift_grad = (torch.empty_like(coefficients[0]) for _ in range(2))
                own = (x_grad, *coefficients, x_grad, scale_grad, shift_grad)
                torch.ops.bsfast.batch_norm_grad_out(x, None, *own, None, ctx.relu)
                pairs = ((scale, scale_grad), (shift, shift_grad))
                grads[3:] = [None if t is None else t_grad.to(t.dtype) for t, t_grad in pairs]
                grads[0] = x_grad if passed is None else x_grad + passed
        return (*grads, *[None] * 4)


def _composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    geometry: tuple[Any, ...],
    norm: tuple[float, bool] | None,
) -> Tensor:
    stride, padding, dilation, groups = geometry
    source = x if norm is None else composite(x, scale, shift, None, *norm)
    y = conv2d(source, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return y if bias is None else y + bias[:, None, :, None, None].to(y.dtype)
