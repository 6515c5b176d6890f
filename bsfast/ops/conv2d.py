"""The convolution triple over M branches, closed under differentiation.

``conv2d``, ``conv2d_input_grad`` and ``conv2d_weight_grad`` are each other's derivatives
(:mod:`bsfast.ops.conv2d_derivatives`); each is one raw operator (:mod:`bsfast.ops.conv2d_kernels`), registered by
:mod:`bsfast.ops.bilinear`.

Shapes: ``x`` is ``(M, N, C_in, H, W)``, or ``(N, C_in, H, W)`` when all branches read one input (its gradient is then
summed over branches); ``weight`` is ``(M, C_out, C_in / groups, kH, kW)``; results are ``(M, N, C_out, H_out, W_out)``.
Batch-last activations (:mod:`bsfast.layout`) give batch-last results, any others contiguous ones.
"""

from collections.abc import Sequence

from torch import Tensor

from bsfast.ops import check, conv2d_derivatives, conv2d_kernels, conv2d_stock
from bsfast.ops.bilinear import Bilinear, autocasts, register, taken_dtype

Pair = tuple[int, int]
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_FAMILY = register({
    "conv2d": Bilinear(
        f"(Tensor x, Tensor weight, {_GEOMETRY}) -> Tensor",
        conv2d_kernels.conv2d,
        conv2d_kernels.conv2d_fake,
        conv2d_stock.conv2d,
        conv2d_derivatives.conv2d_backward,
        conv2d_derivatives.conv2d_vmap,
    ),
    "conv2d_input_grad": Bilinear(
        f"(Tensor grad, Tensor weight, SymInt[] input_size, {_GEOMETRY}) -> Tensor",
        conv2d_kernels.input_grad,
        conv2d_kernels.input_grad_fake,
        conv2d_stock.conv2d_input_grad,
        conv2d_derivatives.input_grad_backward,
        conv2d_derivatives.input_grad_vmap,
    ),
    "conv2d_weight_grad": Bilinear(
        f"(Tensor x, Tensor grad, SymInt[2] kernel_size, {_GEOMETRY}) -> Tensor",
        conv2d_kernels.weight_grad,
        conv2d_kernels.weight_grad_fake,
        conv2d_stock.conv2d_weight_grad,
        conv2d_derivatives.weight_grad_backward,
        conv2d_derivatives.weight_grad_vmap,
    ),
})
_conv2d, _input_grad, _weight_grad = _FAMILY.values()


def conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve every branch's input, or one shared input, with every branch's weights; without bias.

    Equivalent to ``torch.stack([F.conv2d(x[k], weight[k], None, ...) for k in range(M)])``.

    Args:
        x: Shape ``(M, N, C_in, H, W)``, or ``(N, C_in, H, W)`` if shared by all branches.
        weight: Shape ``(M, C_out, C_in / groups, kH, kW)``, dtype and device of ``x`` (under autocast both are cast).
        stride: As ``torch.nn.Conv2d``; an int or a pair.
        padding: Zeros on each side; an int or a pair.
        dilation: As ``torch.nn.Conv2d``.
        groups: Groups inside a branch.

    Returns:
        Shape ``(M, N, C_out, H_out, W_out)``.

    Raises:
        TypeError: If an operand is not a floating-point tensor, or dtypes or devices differ.
        ValueError: If a shape or a setting does not fit.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 5, 3, 3, 3)  # N=2 samples for M=4 branches
        >>> conv2d(x, weight, padding=1).shape
        torch.Size([4, 2, 5, 8, 8])
    """  # noqa: DOC502
    settings = check.geometry("conv2d", stride, padding, dilation, groups)
    if autocasts(x.device.type):
        x, weight = x.to(taken_dtype(x)), weight.to(taken_dtype(weight))
    check.same_kind("conv2d", x=x, weight=weight)
    check.conv2d_shapes("conv2d", x.shape, weight.shape, *settings[1:])
    return _conv2d(x, weight, *settings)


def conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    input_size: tuple[int, ...],
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Gradient of a loss with respect to the input of :func:`conv2d`, given the one with respect to its result.

    Args:
        grad: Shape ``(M, N, C_out, H_out, W_out)``.
        weight: Shape ``(M, C_out, C_in / groups, kH, kW)``.
        input_size: Shape of the input; with 4 entries it was shared, and the result is summed over branches.
        stride: As given to :func:`conv2d`.
        padding: As given to :func:`conv2d`.
        dilation: As given to :func:`conv2d`.
        groups: As given to :func:`conv2d`.

    Returns:
        Shape ``input_size``.

    Raises:
        TypeError: If an operand is not a floating-point tensor, or dtypes or devices differ.
        ValueError: If a shape or a setting does not fit.
    """  # noqa: DOC502
    settings = check.geometry("conv2d_input_grad", stride, padding, dilation, groups)
    check.same_kind("conv2d_input_grad", grad=grad, weight=weight)
    check.conv2d_shapes("conv2d_input_grad", input_size, weight.shape, *settings[1:], x_name="input_size")
    _check_grad("conv2d_input_grad", grad, conv2d_kernels.output_shape(input_size, weight.shape, *settings[:3]))
    return _input_grad(grad, weight, tuple(input_size), *settings)


def conv2d_weight_grad(
    x: Tensor,
    grad: Tensor,
    kernel_size: Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Gradient of a loss with respect to the weights of :func:`conv2d`, given the one with respect to its result.

    Args:
        x: Shape ``(M, N, C_in, H, W)`` or, shared, ``(N, C_in, H, W)``.
        grad: Shape ``(M, N, C_out, H_out, W_out)``.
        kernel_size: kH, kW.
        stride: As given to :func:`conv2d`.
        padding: As given to :func:`conv2d`.
        dilation: As given to :func:`conv2d`.
        groups: As given to :func:`conv2d`.

    Returns:
        Shape ``(M, C_out, C_in / groups, kH, kW)``.

    Raises:
        TypeError: If an operand is not a floating-point tensor, or dtypes or devices differ.
        ValueError: If a shape or a setting does not fit.
    """  # noqa: DOC502
    settings = check.geometry("conv2d_weight_grad", stride, padding, dilation, groups)
    kernel = check.pair("conv2d_weight_grad", "kernel_size", kernel_size, 1)
    check.same_kind("conv2d_weight_grad", x=x, grad=grad)
    if grad.dim() != 5 or (x.dim() == 5 and grad.shape[0] != x.shape[0]):
        stacked = f"M={x.shape[0]}" if x.dim() == 5 else "M"
        wanted = f"({stacked}, N, C_out, H_out, W_out)"
        raise ValueError(f"conv2d_weight_grad: grad must have shape {wanted}, got {tuple(grad.shape)}")
    weight_shape = (grad.shape[0], grad.shape[2], x.shape[-3] // groups if x.dim() > 2 else 0, *kernel)
    check.conv2d_shapes("conv2d_weight_grad", x.shape, weight_shape, *settings[1:])
    _check_grad("conv2d_weight_grad", grad, conv2d_kernels.output_shape(x.shape, weight_shape, *settings[:3]))
    return _weight_grad(x, grad, kernel, *settings)


def _check_grad(function: str, grad: Tensor, shape: Sequence[int]) -> None:
    if tuple(grad.shape) != tuple(shape):
        raise ValueError(f"{function}: grad must have shape {tuple(shape)}, got {tuple(grad.shape)}")
