"""The weight gradient of every sample by itself, over M branches: the convolution's Jacobian, row by row.

It is bilinear in the input and the output's gradient, and its derivatives are convolutions of single samples: with
every sample a branch of its own, they are those of :mod:`bsfast.ops.conv2d`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast.ops import check, plan
from bsfast.ops.bilinear import Bilinear, Functions, register
from bsfast.ops.conv2d import _FAMILY as _TRIPLE
from bsfast.ops.conv2d_derivatives import Grads, fold, fold_input
from bsfast.ops.conv2d_kernels import output_shape
from bsfast.ops.memory_order import to_batch_last

Pair = tuple[int, int]


def conv2d_weight_grad_per_sample(
    x: Tensor,
    grad: Tensor,
    kernel_size: Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Gradient of a loss with respect to the weights of :func:`conv2d`, for every sample by itself.

    Entry n of the last axis equals ``conv2d_weight_grad(x[..., n:n+1, :, :, :], grad[:, n:n+1], ...)``; their sum is
    ``conv2d_weight_grad(x, grad, ...)``. For C gradients (seeds) of every sample, as for a Jacobian, ``grad`` has the
    samples C times; ``x`` is not repeated.

    Args:
        x: Shape ``(M, N, C_in, H, W)`` or, shared by all branches, ``(N, C_in, H, W)``. The own kernel wants it and
            ``grad`` batch-last (:mod:`bsfast.layout`), and converts them if they are not.
        grad: Shape ``(M, R*N, C_out, H_out, W_out)``; its sample r*N + n is seed r of sample n.
        kernel_size: kH, kW.
        stride: As given to :func:`conv2d`.
        padding: As given to :func:`conv2d`.
        dilation: As given to :func:`conv2d`.
        groups: As given to :func:`conv2d`.

    Returns:
        Shape ``(M, C_out, C_in / groups, kH, kW, R*N)``, contiguous.

    Raises:
        TypeError: If an operand is not a floating-point tensor, or dtypes or devices differ.
        ValueError: If a shape or a setting does not fit.

    Example:
        >>> x, grad = torch.randn(2, 3, 8, 8), torch.randn(4, 2, 5, 8, 8)  # N=2 samples for M=4 branches
        >>> conv2d_weight_grad_per_sample(x, grad, (3, 3), padding=1).shape
        torch.Size([4, 5, 3, 3, 3, 2])
    """  # noqa: DOC502 (raised by the checks)
    name = "conv2d_weight_grad_per_sample"
    settings = check.geometry(name, stride, padding, dilation, groups)
    kernel = check.pair(name, "kernel_size", kernel_size, 1)
    check.same_kind(name, x=x, grad=grad)
    if grad.dim() != 5 or (x.dim() == 5 and grad.shape[0] != x.shape[0]):
        branches = f"M={x.shape[0]}" if x.dim() == 5 else "M"
        raise ValueError(
            f"{name}: grad must have shape ({branches}, R*N, C_out, H_out, W_out), got {tuple(grad.shape)}"
        )
    weight_shape = (grad.shape[0], grad.shape[2], x.shape[-3] // groups if x.dim() > 2 else 0, *kernel)
    check.conv2d_shapes(name, x.shape, weight_shape, *settings[1:])
    _, samples, *wanted = output_shape(x.shape, weight_shape, *settings[:3])
    if list(grad.shape[2:]) != wanted or (grad.shape[1] % samples if samples else grad.shape[1]):
        shape = f"({grad.shape[0]}, a multiple of N={samples}, {', '.join(map(str, wanted))})"
        raise ValueError(f"{name}: grad must have shape {shape}, got {tuple(grad.shape)}")
    return _per_sample(x, grad, kernel, *settings)


def _kernel(x: Tensor, grad: Tensor, kernel_size: Pair, *geometry: Any) -> Tensor:
    chosen = plan.conv2d_weight_grad_per_sample(device=x.device.type, dtype=x.dtype, samples=x.shape[-4])
    if chosen.algorithm != "native":
        return _unfold(x, grad, kernel_size, *geometry)
    out = _fake(x, grad, kernel_size, *geometry)
    torch.ops.bsfast.conv2d_weight_grad_per_sample_out(to_batch_last(x), to_batch_last(grad), out, *geometry)
    return out


def _fake(x: Tensor, grad: Tensor, kernel_size: Pair, *geometry: Any) -> Tensor:
    size = (grad.shape[0], grad.shape[2], x.shape[-3] // geometry[3], *kernel_size, grad.shape[1])
    return x.new_empty(size)


def _unfold(
    x: Tensor, grad: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Compute it by stock operators: the output's gradient times the patches of the input, one product a sample."""
    samples, channels = x.shape[-4:-2]
    patches = F.unfold(x.flatten(0, -4), kernel_size, dilation, padding, stride)
    inner, positions = patches.shape[1] // groups, patches.shape[2]
    patches = patches.reshape(*x.shape[:-4], 1, samples, groups, inner, positions)
    rows = grad.reshape(grad.shape[0], _seeds(x, grad), samples, groups, grad.shape[2] // groups, positions)
    products = (rows @ patches.mT).permute(0, 3, 4, 5, 1, 2)  # (M, G, O, C*kH*kW, R, N)
    size = (grad.shape[0], grad.shape[2], channels // groups, *kernel_size, grad.shape[1])
    return products.reshape(size).contiguous()


def _backward(f: Functions, needs: Any, t: Tensor, x: Tensor, g: Tensor, _: Any, *geometry: Any) -> Grads:
    """Gradients of <t, conv2d_weight_grad_per_sample(x, g)>, with every sample of x a branch."""
    # Seeds are further output channels of that branch; so are the branches, where one input is shared.
    seeds, samples, groups, branches = _seeds(x, g), x.shape[-4], geometry[3], g.shape[0]
    if samples == 0:
        return torch.zeros_like(x), torch.zeros_like(g)
    single = x.reshape(-1, 1, *x.shape[-3:])
    channels, taps, space = g.shape[2] // groups, t.shape[2:5], g.shape[3:]
    by_sample = (2, 3, 0, 1) if x.dim() == 4 else (0, 2, 3, 1)  # (M, R, N, G) to (N, G, M, R) or (M, N, G, R)
    back = (2, 3, 0, 1) if x.dim() == 4 else (0, 3, 1, 2)
    weight = t.reshape(branches, groups, channels, *taps, seeds, samples).permute(0, 6, 7, 1, 2, 3, 4, 5)
    weight = weight.permute(*by_sample, 4, 5, 6, 7).reshape(single.shape[0], -1, *taps)
    x_grad = g_grad = None
    if needs[0]:
        own = g.reshape(branches, seeds, samples, groups, channels, *space).permute(*by_sample, 4, 5, 6)
        own = own.reshape(single.shape[0], 1, -1, *space)
        x_grad = f["conv2d_input_grad"](own, weight, tuple(single.shape), *geometry).reshape(x.shape)
    if needs[1]:
        sizes = (branches, seeds, samples, groups)
        y = f["conv2d"](single, weight, *geometry)
        y = y.reshape(*(sizes[axis] for axis in by_sample), channels, *space).permute(*back, 4, 5, 6)
        g_grad = y.reshape(g.shape)
    return x_grad, g_grad


def _vmap(f: Functions, size: int, dims: tuple[Any, ...], x: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """The mapped axis joins the seeds, or the branches where the input is mapped too."""
    op = f["conv2d_weight_grad_per_sample"]
    if dims[0] is None:
        per_seed = g.movedim(dims[1], 1).permute(0, 3, 4, 5, 1, 2)
        seeds = per_seed.flatten(4).movedim(-1, 1)  # copied once, to batch-last memory
        return op(x, seeds, *rest).unflatten(-1, (size, per_seed.shape[-1])), 5
    branches = g.shape[0] if dims[1] is None else g.movedim(dims[1], 0).shape[1]
    out = op(fold_input(x, dims[0], size, branches), fold(g, dims[1], size), *rest)
    return out.unflatten(0, (size, branches)), 0


def _seeds(x: Tensor, grad: Tensor) -> int:
    return grad.shape[1] // x.shape[-4] if x.shape[-4] else 1


_FAMILY = register(
    {
        "conv2d_weight_grad_per_sample": Bilinear(
            "(Tensor x, Tensor grad, SymInt[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups)"
            " -> Tensor",
            _kernel,
            _fake,
            _unfold,
            _backward,
            _vmap,
        )
    },
    _TRIPLE,
)
(_per_sample,) = _FAMILY.values()
