"""The convolution triple on stock PyTorch operators: the fallback of every device and the truth of none.

Shapes as in :mod:`bsfast.ops.conv2d`. ``loop`` runs one call a branch, ``grouped`` one call for all; both are
differentiable compositions, so that nested forward mode can run through them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def conv2d(
    x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, *, algorithm: str = "loop"
) -> Tensor:
    """Convolve each branch, or one input shared by all, with each branch's weights."""
    if x.dim() == 4:
        y = F.conv2d(x, _shared_weight(weight, groups), None, stride, padding, dilation, groups)
        return y.unflatten(1, (groups, weight.shape[0], -1)).permute(2, 0, 1, 3, 4, 5).flatten(2, 3)
    if algorithm == "loop":
        pairs = zip(x.unbind(0), weight.unbind(0), strict=True)
        return torch.stack([F.conv2d(x_k, w_k, None, stride, padding, dilation, groups) for x_k, w_k in pairs])
    branches = x.shape[0]
    y = F.conv2d(_merge(x), weight.flatten(0, 1), None, stride, padding, dilation, groups * branches)
    return _split(y, branches)


def conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    input_size: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    *,
    algorithm: str = "loop",
) -> Tensor:
    """Gradient of the loss with respect to the input; summed over branches if the input is shared."""
    geometry = (stride, padding, dilation)
    if len(input_size) == 4:
        grad = _shared_grad(grad, groups)
        return _input_grad(grad, _shared_weight(weight, groups), input_size, *geometry, groups)
    if algorithm == "loop":
        pairs = zip(grad.unbind(0), weight.unbind(0), strict=True)
        return torch.stack([_input_grad(g_k, w_k, input_size[1:], *geometry, groups) for g_k, w_k in pairs])
    branches, samples, channels, *space = input_size
    merged = (samples, branches * channels, *space)
    return _split(_input_grad(_merge(grad), weight.flatten(0, 1), merged, *geometry, groups * branches), branches)


def conv2d_weight_grad(
    x: Tensor,
    grad: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    *,
    algorithm: str = "loop",
) -> Tensor:
    """Gradient of the loss with respect to each branch's weights."""
    geometry = (stride, padding, dilation)
    branches, out_channels = grad.shape[0], grad.shape[2]
    size = (out_channels, x.shape[-3] // groups, *kernel_size)
    if x.dim() == 4:
        merged = (branches * out_channels, *size[1:])
        shared = _weight_grad(x, _shared_grad(grad, groups), merged, *geometry, groups)
        return shared.unflatten(0, (groups, branches, -1)).transpose(0, 1).flatten(1, 2)
    if algorithm == "loop":
        pairs = zip(x.unbind(0), grad.unbind(0), strict=True)
        return torch.stack([_weight_grad(x_k, g_k, size, *geometry, groups) for x_k, g_k in pairs])
    merged = (branches * out_channels, *size[1:])
    return _weight_grad(_merge(x), _merge(grad), merged, *geometry, groups * branches).unflatten(0, (branches, -1))


def _input_grad(
    grad: Tensor, weight: Tensor, size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    x = grad.new_empty(1).expand(size)
    return _backward(grad, x, weight, stride, padding, dilation, groups, (True, False, False))[0]


def _weight_grad(
    x: Tensor, grad: Tensor, size: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    weight = grad.new_empty(1).expand(size)
    return _backward(grad, x, weight, stride, padding, dilation, groups, (False, True, False))[1]


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten.convolution_backward
    result: tuple[Tensor, Tensor, Tensor] = backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, mask
    )
    return result


def _merge(x: Tensor) -> Tensor:
    """(M, N, C, H, W) -> (N, M*C, H, W), the input of a grouped convolution."""
    return x.transpose(0, 1).flatten(1, 2)


def _split(y: Tensor, branches: int) -> Tensor:
    return y.unflatten(1, (branches, -1)).transpose(0, 1)


def _shared_weight(weight: Tensor, groups: int) -> Tensor:
    """(M, O, C, kH, kW) -> (M*O, C, kH, kW) with the inner groups outermost, as a grouped convolution wants them."""
    return weight.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)


def _shared_grad(grad: Tensor, groups: int) -> Tensor:
    return grad.unflatten(2, (groups, -1)).permute(1, 2, 0, 3, 4, 5).flatten(1, 3)
