r"""The convolution triple over M branches, closed under differentiation.

Convolution is bilinear, so ``conv2d``, ``conv2d_input_grad`` and ``conv2d_weight_grad`` are each other's derivatives: the
backward of each is the other two, its jvp is two calls of itself, its vmap folds the mapped axis into the branch axis.

Shapes: ``x`` is ``(M, N, C_in, H, W)``, or ``(N, C_in, H, W)`` when all branches read one input (its gradient is then
summed over branches); ``weight`` is ``(M, C_out, C_in / groups, kH, kW)``; results are ``(M, N, C_out, H_out, W_out)``.
Batch-last activations (:mod:`bsfast.layout`) give batch-last results, any others contiguous ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bsfast.layout import batch_last_strides, empty_batch_last, is_batch_last, to_batch_last
from bsfast.ops import conv2d_stock, plan
from bsfast.ops.check import check_conv2d, pair
from bsfast.ops.functorch import forward_mode_levels
from bsfast.ops.library import LIBRARY

Pair = tuple[int, int]
GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
SCHEMAS = {
    "conv2d": f"(Tensor x, Tensor weight, {GEOMETRY}) -> Tensor",
    "conv2d_input_grad": f"(Tensor grad, Tensor weight, SymInt[] input_size, {GEOMETRY}) -> Tensor",
    "conv2d_weight_grad": f"(Tensor x, Tensor grad, SymInt[2] kernel_size, {GEOMETRY}) -> Tensor",
}


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
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 5, 3, 3, 3)  # N=2 samples for M=4 branches
        >>> conv2d(x, weight, padding=1).shape
        torch.Size([4, 2, 5, 8, 8])
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    geometry = (pair("conv2d", "stride", stride), pair("conv2d", "padding", padding))
    geometry += (pair("conv2d", "dilation", dilation),)
    check_conv2d(x, weight, *geometry, groups)
    return _conv2d(x, weight, *geometry, groups)


@torch.compiler.allow_in_graph
def _conv2d(x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    return _call("conv2d", x, weight, *geometry)


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
        ValueError: If a setting is not an int or a pair.
    """
    geometry = [pair("conv2d_input_grad", *setting) for setting in _named(stride, padding, dilation)]
    return _conv2d_input_grad(grad, weight, tuple(input_size), *geometry, groups)


@torch.compiler.allow_in_graph
def _conv2d_input_grad(grad: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _call("conv2d_input_grad", grad, weight, *rest)


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
        ValueError: If a setting is not an int or a pair.
    """
    geometry = [pair("conv2d_weight_grad", *setting) for setting in _named(stride, padding, dilation)]
    return _conv2d_weight_grad(x, grad, tuple(kernel_size), *geometry, groups)


@torch.compiler.allow_in_graph
def _conv2d_weight_grad(x: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    return _call("conv2d_weight_grad", x, grad, *rest)


def _named(stride: Any, padding: Any, dilation: Any) -> tuple[tuple[str, Any], ...]:
    return ("stride", stride), ("padding", padding), ("dilation", dilation)


def _call(name: str, *args: Any) -> Tensor:
    if forward_mode_levels() > 1:
        result: Tensor = getattr(conv2d_stock, name)("loop", *args)
        return result
    return _FUNCTIONS[name](*args)


# --- The raw operators: schema, kernel, fake ---------------------------------------------------------------------------


def _plan(activation: Tensor, kernel_size: tuple[int, ...], stride: Pair, dilation: Pair, groups: int) -> plan.Plan:
    return plan.conv2d(
        device=activation.device.type,
        dtype=activation.dtype,
        batch_last=is_batch_last(activation),
        kernel_size=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
    )


def _conv2d_kernel(
    x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, fake: bool = False
) -> Tensor:
    sizes = zip(x.shape[-2:], weight.shape[-2:], stride, padding, dilation, strict=True)
    space = [(size + 2 * pad - dilate * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, dilate in sizes]
    shape = (weight.shape[0], x.shape[-4], weight.shape[1], *space)
    chosen = _plan(x, weight.shape[-2:], stride, dilation, groups)
    if fake:
        return _empty(shape, x)
    if chosen.algorithm == "native":
        return _conv3x3(x, weight, shape, padding)
    y = conv2d_stock.conv2d(chosen.algorithm, x, weight, stride, padding, dilation, groups)
    return _ordered(y, x)


def _input_grad_kernel(
    grad: Tensor,
    weight: Tensor,
    input_size: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    fake: bool = False,
) -> Tensor:
    if fake:
        return _empty(input_size, grad)
    chosen = _plan(grad, weight.shape[-2:], stride, dilation, groups)
    if chosen.algorithm == "native" and len(input_size) == 5 and max(padding) <= 2:
        # The adjoint of a 3x3 stride-1 convolution is one with the flipped, transposed weights.
        flipped = weight.flip(-1, -2).transpose(1, 2)
        return _conv3x3(grad, flipped, input_size, (2 - padding[0], 2 - padding[1]))
    algorithm = plan.stock(grad.device.type, "").algorithm
    geometry = (stride, padding, dilation, groups)
    return _ordered(conv2d_stock.conv2d_input_grad(algorithm, grad, weight, tuple(input_size), *geometry), grad)


def _weight_grad_kernel(
    x: Tensor,
    grad: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    fake: bool = False,
) -> Tensor:
    if fake:
        return x.new_empty((grad.shape[0], grad.shape[2], x.shape[-3] // groups, *kernel_size))
    algorithm = plan.stock(x.device.type, "").algorithm
    geometry = (stride, padding, dilation, groups)
    return conv2d_stock.conv2d_weight_grad(algorithm, x, grad, kernel_size, *geometry).contiguous()


def _conv3x3(x: Tensor, weight: Tensor, shape: tuple[int, ...], padding: Pair) -> Tensor:
    out = empty_batch_last(shape, dtype=x.dtype, device=x.device)
    torch.ops.bsfast.conv3x3(x, weight.contiguous(), out, *padding)
    return out


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if is_batch_last(like):
        return like.new_empty_strided(shape, batch_last_strides(shape))
    return like.new_empty(shape)


def _ordered(y: Tensor, like: Tensor) -> Tensor:
    return to_batch_last(y) if is_batch_last(like) else y.contiguous()


# --- Derivatives, the same formulas for the raw operators and for the public functions ----------------------------------

Ops = dict[str, Callable[..., Tensor]]


def _conv2d_backward(ops: Ops, needs: Any, t: Tensor, x: Tensor, w: Tensor, *geometry: Any) -> tuple[Any, Any]:
    return (
        ops["conv2d_input_grad"](t, w, tuple(x.shape), *geometry) if needs[0] else None,
        ops["conv2d_weight_grad"](x, t, tuple(w.shape[-2:]), *geometry) if needs[1] else None,
    )


def _input_grad_backward(
    ops: Ops, needs: Any, t: Tensor, g: Tensor, w: Tensor, _: Any, *geometry: Any
) -> tuple[Any, Any]:
    return (
        ops["conv2d"](t, w, *geometry) if needs[0] else None,
        ops["conv2d_weight_grad"](t, g, tuple(w.shape[-2:]), *geometry) if needs[1] else None,
    )


def _weight_grad_backward(
    ops: Ops, needs: Any, t: Tensor, x: Tensor, g: Tensor, _: Any, *geometry: Any
) -> tuple[Any, Any]:
    return (
        ops["conv2d_input_grad"](g, t, tuple(x.shape), *geometry) if needs[0] else None,
        ops["conv2d"](x, t, *geometry) if needs[1] else None,
    )


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Fold a vmapped axis into the branch axis (axis 0)."""
    t = t.movedim(dim, 0) if dim is not None else t.unsqueeze(0).expand(size, *t.shape)
    return t.flatten(0, 1)


def _spread(x: Tensor, dim: int | None, branches: int) -> tuple[Tensor, int]:
    """Give a shared input, mapped along ``dim``, the branch axis it lacks: (B, M, N, C, H, W), mapped along 0."""
    x = x.movedim(dim, 0) if dim is not None else x.unsqueeze(0)
    return x.unsqueeze(1).expand(-1, branches, -1, -1, -1, -1), 0


def _conv2d_vmap(
    ops: Ops, size: int, dims: tuple[Any, ...], x: Tensor, w: Tensor, *geometry: Any
) -> tuple[Tensor, int]:
    branches = w.shape[0] if dims[1] is None else w.movedim(dims[1], 0).shape[1]
    shared = x.dim() - (dims[0] is not None) == 4
    if shared and dims[1] is None:  # fold into the samples instead: the input stays shared
        return ops["conv2d"](_fold(x, dims[0], size), w, *geometry).unflatten(1, (size, -1)), 1
    if shared and dims[0] is None:
        return ops["conv2d"](x, _fold(w, dims[1], size), *geometry).unflatten(0, (size, branches)), 0
    if shared:
        x, _ = _spread(x, dims[0], branches)
        dims = (0, dims[1])
    y = ops["conv2d"](_fold(x, dims[0], size), _fold(w, dims[1], size), *geometry)
    return y.unflatten(0, (size, branches)), 0


def _input_grad_vmap(
    ops: Ops, size: int, dims: tuple[Any, ...], g: Tensor, w: Tensor, input_size: tuple[int, ...], *geometry: Any
) -> tuple[Tensor, int]:
    branches = w.shape[0] if dims[1] is None else w.movedim(dims[1], 0).shape[1]
    samples, *rest = input_size[-4:]
    if len(input_size) == 4 and dims[1] is None:
        folded = g.movedim(dims[0], 1).flatten(1, 2)
        x_grad = ops["conv2d_input_grad"](folded, w, (size * samples, *rest), *geometry)
        return x_grad.unflatten(0, (size, samples)), 0
    folded_size = (size * branches, samples, *rest)
    x_grad = ops["conv2d_input_grad"](_fold(g, dims[0], size), _fold(w, dims[1], size), folded_size, *geometry)
    x_grad = x_grad.unflatten(0, (size, branches))
    return (x_grad.sum(1) if len(input_size) == 4 else x_grad), 0


def _weight_grad_vmap(
    ops: Ops, size: int, dims: tuple[Any, ...], x: Tensor, g: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    branches = g.shape[0] if dims[1] is None else g.movedim(dims[1], 0).shape[1]
    shared = x.dim() - (dims[0] is not None) == 4
    if shared and dims[0] is None:
        w_grad = ops["conv2d_weight_grad"](x, _fold(g, dims[1], size), *rest)
        return w_grad.unflatten(0, (size, branches)), 0
    if shared:
        x, _ = _spread(x, dims[0], branches)
        dims = (0, dims[1])
    w_grad = ops["conv2d_weight_grad"](_fold(x, dims[0], size), _fold(g, dims[1], size), *rest)
    return w_grad.unflatten(0, (size, branches)), 0


# --- Registration ------------------------------------------------------------------------------------------------------

_KERNELS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], Callable[..., Any]]] = {
    "conv2d": (_conv2d_kernel, _conv2d_backward, _conv2d_vmap),
    "conv2d_input_grad": (_input_grad_kernel, _input_grad_backward, _input_grad_vmap),
    "conv2d_weight_grad": (_weight_grad_kernel, _weight_grad_backward, _weight_grad_vmap),
}
_RAW: Ops = {}
_FUNCTIONS: Ops = {}


def _register(name: str) -> None:
    kernel, backward, vmap = _KERNELS[name]
    qualified = f"bsfast::{name}"
    LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.needs_exact_strides,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _RAW[name] = getattr(torch.ops.bsfast, name)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch's signature)
        ctx.save_for_backward(*inputs[:2])
        ctx.rest = inputs[2:]

    def raw_backward(ctx: Any, t: Tensor) -> tuple[Any, ...]:
        grads = backward(_RAW, ctx.needs_input_grad, t, *ctx.saved_tensors, *ctx.rest)
        return (*grads, *[None] * len(ctx.rest))

    torch.library.register_fake(qualified, lambda *args: kernel(*args, fake=True), lib=LIBRARY)
    torch.library.register_autograd(qualified, raw_backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_vmap(
        qualified, lambda info, dims, *args: vmap(_RAW, info.batch_size, dims, *args), lib=LIBRARY
    )

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return _RAW[name](*args)

        @staticmethod
        def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
            setup_context(ctx, inputs, output)
            ctx.save_for_forward(*inputs[:2])

        @staticmethod
        def backward(ctx: Any, t: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
            grads = backward(_FUNCTIONS, ctx.needs_input_grad, t, *ctx.saved_tensors, *ctx.rest)
            return (*grads, *[None] * len(ctx.rest))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            (a, b), (da, db) = ctx.saved_tensors, tangents[:2]
            terms = [_FUNCTIONS[name](da, b, *ctx.rest)] if da is not None else []
            terms += [_FUNCTIONS[name](a, db, *ctx.rest)] if db is not None else []
            return terms[0] if len(terms) == 1 else terms[0] + terms[1]

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:  # type: ignore[override]
            result: tuple[Tensor, int] = vmap(_FUNCTIONS, info.batch_size, in_dims, *args)
            return result

    _FUNCTIONS[name] = Op.apply


for _name in _KERNELS:
    _register(_name)
