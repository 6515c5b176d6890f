"""Gradients of a layer's parameters, one for every sample; the samples are the last axis.

For a layer ``z = layer(x)`` and a loss that is a sum over samples, the gradient of a parameter is the sum of these.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from bsfast import ops
from bsfast.nn import functional
from bsfast.nn.layers import BatchNorm, Conv2d, Linear, PReLU


def per_sample_grads(
    layer: nn.Module, x: Tensor, grad: Tensor, names: Collection[str], *, shared: bool
) -> dict[str, Tensor]:
    """Gradients of a branched layer's parameters for every sample.

    Args:
        layer: One for which :func:`has_per_sample_grads` holds; batch normalisation in evaluation mode.
        x: Its input, ``(M, N, ...)``, or ``(N, ...)`` if shared.
        grad: Gradient with respect to its result, ``(M, N, ...)``.
        names: Names of the layer's parameters.
        shared: Whether all branches read one input.

    Returns:
        By name, ``(M, *shape, N)``.
    """
    return {name: _GRADS[type(layer)][name](layer, x, grad, shared) for name in names}


def has_per_sample_grads(layer: nn.Module) -> bool:
    """Whether :func:`per_sample_grads` knows the layer; no subclass, whose forward may do more."""
    if type(layer) is BatchNorm:
        return not layer.training and layer.running_mean is not None
    return type(layer) in _GRADS


def _conv2d_weight(layer: Any, x: Tensor, grad: Tensor, _: bool) -> Tensor:
    own: nn.Conv2d = layer.settings
    padding: Any = own.padding
    if own.padding_mode != "zeros":
        x, padding = functional.pad(x, own._reversed_padding_repeated_twice, own.padding_mode), 0
    if isinstance(padding, str):
        x, padding = functional.pad_by_name(x, padding, layer.weight, own.stride, own.dilation)
    kernel = (layer.weight.shape[-2], layer.weight.shape[-1])
    settings: dict[str, Any] = {"stride": own.stride, "dilation": own.dilation, "groups": own.groups}
    return ops.conv2d_weight_grad_per_sample(x, grad, kernel, padding=padding, **settings)


def _linear_weight(_: Any, x: Tensor, grad: Tensor, shared: bool) -> Tensor:
    inputs = x.unsqueeze(0) if shared else x
    return torch.matmul(_rows(grad).mT, _rows(inputs)).permute(0, 2, 3, 1)


def _linear_bias(_: Any, __: Tensor, grad: Tensor, ___: bool) -> Tensor:
    return _rows(grad).sum(2).mT


def _rows(x: Tensor) -> Tensor:
    """All vectors of a sample, ``(M, N, T, features)``."""
    return x.flatten(2, -2) if x.dim() > 3 else x.unsqueeze(2)


def _batch_norm_weight(layer: Any, x: Tensor, grad: Tensor, _: bool) -> Tensor:
    scale = (layer.running_var + layer.settings.eps).rsqrt()
    return _over_space(grad * functional.affine(x, scale, None, before=-layer.running_mean)).mT


def _prelu_weight(layer: Any, x: Tensor, grad: Tensor, _: bool) -> Tensor:
    terms = _over_space(torch.where(x > 0, 0, x * grad))  # (M, N, C)
    return (terms if layer.weight.shape[1] == terms.shape[2] else terms.sum(2, keepdim=True)).mT


def _channels(_: Any, __: Tensor, grad: Tensor, ___: bool) -> Tensor:
    return _over_space(grad).mT


def _over_space(x: Tensor) -> Tensor:
    return x.flatten(3).sum(3) if x.dim() > 3 else x


_GRADS: dict[type[nn.Module], dict[str, Callable[[Any, Tensor, Tensor, bool], Tensor]]] = {
    Conv2d: {"weight": _conv2d_weight, "bias": _channels},
    Linear: {"weight": _linear_weight, "bias": _linear_bias},
    BatchNorm: {"weight": _batch_norm_weight, "bias": _channels},
    PReLU: {"weight": _prelu_weight},
}
