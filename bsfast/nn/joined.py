"""Convolution and batch normalisation layers that run as one kernel."""

from typing import Any

import torch
from torch import Tensor

from bsfast import ops
from bsfast.nn.folded import geometry_of, scale_and_bias
from bsfast.nn.layers import BatchNorm, Conv2d

Moments = tuple[Tensor, Tensor]


def has_memory(x: Tensor) -> bool:
    """Whether a tensor has data that kernels can take."""
    return ops.has_memory(x)


def why_not_norm_conv2d(x: Tensor, norm: BatchNorm | None, conv: Conv2d, *, relu: bool) -> str | None:
    """Say why :func:`norm_conv2d` cannot take these, or None if it can; arguments as there."""
    own: Any = conv.settings
    if x.shape[-3] != own.in_channels or 0 in x.shape:
        return "the input has another number of channels, or no values"
    if min(ops.output_shape(x.shape, conv.weight.shape, *geometry_of(conv)[:3])[-2:]) < 1:
        return "the kernel is larger than the padded input"
    if norm is not None and not _fits(norm, own.in_channels, x):
        return "the normalisation has another number of channels, or another dtype"
    before = None if norm is None else _norm(norm, relu, None)
    chosen = ops.plan_norm_conv2d(x, conv.weight, conv.bias, geometry_of(conv), before)
    if chosen.algorithm != "native":
        return chosen.reason
    enough = norm is None or x[0, :, 0].numel() > 1
    return None if enough else "too few values to normalise"


def norm_conv2d(
    x: Tensor, norm: BatchNorm | None, conv: Conv2d, *, relu: bool = False, moments: Moments | None = None
) -> tuple[Tensor, Moments, Tensor]:
    """Convolve values, or their normalisation with the statistics of the batch, and describe the result.

    Args:
        x: Shape ``(M, N, C_in, H, W)``, or without a normalisation ``(N, C_in, H, W)``.
        norm: The normalisation, or None; its running statistics are moved.
        conv: The convolution.
        relu: Whether a ReLU stands between them.
        moments: Mean and variance of the channels of x, ``(M, C_in)``, if they are known.

    Returns:
        The result, mean and variance of its channels, and x for what else takes it.
    """
    before = None if norm is None else _norm(norm, relu, moments)
    result = ops.norm_conv2d(x, conv.weight, conv.bias, geometry_of(conv), before)
    if norm is not None and result.input_moments is not None:
        norm.track(*result.input_moments, count=x[0, :, 0].numel())
    return result.y, result.moments, result.x


def why_not_conv2d_norm(x: Tensor, conv: Conv2d, norm: BatchNorm | None, residual: Tensor | None) -> str | None:
    """Say why :func:`conv2d_norm` cannot take these, or None if it can; arguments as there."""
    tensors = [x, conv.weight, conv.bias, residual]
    tensors += [] if norm is None else [norm.weight, norm.bias]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "gradients are recorded"
    shape = ops.output_shape(x.shape, conv.weight.shape, *geometry_of(conv)[:3])
    if residual is not None and (residual.shape != shape or residual.dtype != ops.taken_dtype(x)):
        return "the other value of the sum has another shape or dtype"
    if norm is not None and not _fits(norm, conv.weight.shape[1], x):
        return "the normalisation has another number of channels, or another dtype"
    return why_not_norm_conv2d(x, None, conv, relu=False)


def conv2d_norm(x: Tensor, conv: Conv2d, norm: BatchNorm | None, residual: Tensor | None, *, relu: bool) -> Tensor:
    """Convolve; then normalise with running statistics, add and apply a ReLU, where asked. Without gradients.

    Args:
        x: Shape ``(M, N, C_in, H, W)``, or ``(N, C_in, H, W)`` if shared by all branches.
        conv: The convolution.
        norm: The normalisation, or None.
        residual: What is added, of the result's shape, or None.
        relu: Whether a ReLU comes last.

    Returns:
        Shape ``(M, N, C_out, H_out, W_out)``.
    """
    scale, bias = scale_and_bias(conv, norm)
    return ops.folded_conv2d(x, conv.weight, bias, geometry_of(conv), residual, scale=scale, relu=relu)


def _fits(norm: BatchNorm, channels: int, x: Tensor) -> bool:
    own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    settings: Any = norm.settings
    dtype = ops.taken_dtype(x)
    kinds = {dtype, ops.statistics_dtype(dtype)}
    return settings.num_features == channels and all(t is None or t.dtype in kinds for t in own)


def _norm(norm: BatchNorm, relu: bool, moments: Moments | None) -> ops.Norm:
    own: Any = norm.settings
    return ops.Norm(norm.weight, norm.bias, own.eps, relu, moments)
