"""The raw convolution operators: what each computes on this host, and a fake of it for tracing.

Shapes as in :mod:`bsfast.ops.conv2d`. Batch-last activations (:mod:`bsfast.layout`) give batch-last results, any others
contiguous ones; of two activations the first decides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsfast.layout import batch_last_strides, is_batch_last
from bsfast.ops import conv2d_stock, plan

Pair = tuple[int, int]


def conv2d(x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    """Convolve each branch."""
    chosen = plan.conv2d(problem(x, x.shape, weight.shape, *geometry))
    if chosen.algorithm == "native":
        return native_conv2d(x, weight, geometry, winograd=chosen.tile)
    return _ordered(conv2d_stock.conv2d(x, weight, *geometry, algorithm=chosen.algorithm), x)


def native_conv2d(x: Tensor, weight: Tensor, geometry: Sequence[Any], **around: Any) -> Tensor:
    """Convolve each branch by the own kernel, with the tile, prologue and epilogue that ``conv2d_out`` names."""
    out = _empty(output_shape(x.shape, weight.shape, *geometry[:3]), x)
    torch.ops.bsfast.conv2d_out(x, weight.contiguous(), out, *geometry, **around)
    return out


def conv2d_fake(x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    """Allocate the result of conv2d and note its plan, for reports."""
    if plan.is_noting() and not any(isinstance(size, torch.SymInt) for size in x.shape):
        plan.conv2d(problem(x, x.shape, weight.shape, *geometry))
    return _empty(output_shape(x.shape, weight.shape, *geometry[:3]), x)


def input_grad(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    *geometry: Any,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the input; with a residual added and a mask applied to it where they are given.

    Args:
        grad: Of the result, in the memory order of the gradient.
        weight: The weights.
        input_size: The input's shape.
        geometry: Stride, padding, dilation, each a pair, and groups.
        residual: What is added, or None.
        mask: Where it is at most 0, the result is zero; or None.
        like: In which memory order the gradient will be; in that of ``grad`` by default, which for one pixel of one
            channel could be either.

    Returns:
        The gradient.
    """
    like = grad if like is None else like
    chosen = plan.conv2d_input_grad(problem(like, input_size, weight.shape, *geometry))
    if chosen.algorithm == "native":
        out = _empty(input_size, like)
        beside = {"residual": residual, "mask": mask}
        around = {name: None if other is None else in_order_of(other, like) for name, other in beside.items()}
        torch.ops.bsfast.conv2d_input_grad_out(
            grad, weight.contiguous(), out, *geometry, winograd=chosen.tile, **around
        )
        return out
    x_grad = conv2d_stock.conv2d_input_grad(grad, weight, tuple(input_size), *geometry, algorithm=chosen.algorithm)
    x_grad = x_grad if residual is None else x_grad + residual
    return _ordered(x_grad if mask is None else torch.where(mask <= 0, 0, x_grad), like)


def input_grad_fake(grad: Tensor, weight: Tensor, input_size: Sequence[int], *geometry: Any) -> Tensor:  # noqa: ARG001
    """Allocate the result of conv2d_input_grad."""
    return _empty(input_size, grad)


def weight_grad(x: Tensor, grad: Tensor, kernel_size: Pair, *geometry: Any, **prologue: Any) -> Tensor:
    """Gradient with respect to the weights; with a prologue of the input only by the own kernel."""
    out = weight_grad_fake(x, grad, kernel_size, *geometry)
    chosen = plan.conv2d_weight_grad(problem(x, x.shape, out.shape, *geometry))
    if chosen.algorithm == "native":
        around = {**prologue, "winograd": chosen.tile, "patches": chosen.patches}
        torch.ops.bsfast.conv2d_weight_grad_out(x, in_order_of(grad, x), out, *geometry, **around)
        return out
    if prologue:
        raise RuntimeError(f"weight_grad: a prologue needs the own kernel, got {chosen.reason}")
    w_grad = conv2d_stock.conv2d_weight_grad(x, grad, kernel_size, *geometry, algorithm=chosen.algorithm)
    return _ordered(w_grad)


def weight_grad_fake(x: Tensor, grad: Tensor, kernel_size: Pair, *geometry: Any) -> Tensor:
    """Allocate the result of conv2d_weight_grad."""
    return x.new_empty((grad.shape[0], grad.shape[2], x.shape[-3] // geometry[3], *kernel_size))


def output_shape(
    x_shape: Sequence[int], weight_shape: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, ...]:
    """Shape ``(M, N, C_out, H_out, W_out)`` of the convolution."""
    sizes = zip(x_shape[-2:], weight_shape[-2:], stride, padding, dilation, strict=True)
    space = [(size + 2 * pad - dilate * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, dilate in sizes]
    return (weight_shape[0], x_shape[-4], weight_shape[1], *space)


def in_order_of(grad: Tensor, x: Tensor) -> Tensor:
    """Give a gradient the memory order of the input, if it has another."""
    same = is_batch_last(grad) if is_batch_last(x) else grad.is_contiguous()
    return grad if same else _ordered(grad, x)


def problem(
    activation: Tensor,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> plan.Conv2d:
    """Describe a convolution, or a gradient whose first activation this is, to :mod:`bsfast.ops.plan`."""
    samples = activation.shape[-4]
    return plan.Conv2d(
        device=activation.device.type,
        dtype=activation.dtype,
        batch_last=is_batch_last(activation) or (samples == 1 and activation.is_contiguous()),
        samples=samples,
        kernel_size=(weight_size[-2], weight_size[-1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        shared=len(input_size) == 4,
        channels=(weight_size[2], weight_size[1] // groups),
        size=(input_size[-2], input_size[-1]),
    )


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    if is_batch_last(like):
        return like.new_empty_strided(tuple(shape), batch_last_strides(shape))
    return like.new_empty(tuple(shape))


def _ordered(y: Tensor, like: Tensor | None = None) -> Tensor:
    """Give ``y`` the memory order of ``like``, or make it contiguous."""
    # A view made in here is copied, too: autograd forbids the caller to change it in place, as relu_ does.
    out = y.new_empty(y.shape) if like is None else _empty(y.shape, like)
    return y if y.stride() == out.stride() and not y._is_view() else out.copy_(y)
