"""Registration of a family of bilinear operators: raw operator, fake, backward, forward mode and vmap of every member.

A family is closed under differentiation: the backward and the vmap rule of a member are written with members, and its
jvp is two calls of itself. One set of formulas serves the raw operators ``torch.ops.bsfast.*`` (direct callers, export)
and the functions made here (``torch.func``, forward mode), so that every order of differentiation works.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsfast.ops.functorch import forward_mode_levels
from bsfast.ops.library import LIBRARY

Functions = Mapping[str, Callable[..., Tensor]]


class Bilinear(NamedTuple):
    """One operator; it is linear in each of its first two arguments, and the others are settings.

    Attributes:
        schema: Arguments and result, as ``torch.library.define`` wants them.
        kernel: Computes the result.
        fake: Allocates a result without computing it: same shape, strides, dtype, device.
        composite: Computes the result by stock operators that are differentiable any number of times.
        backward: ``(functions, needs_input_grad, grad, *args)`` to the two gradients, None where not needed.
        vmap: ``(functions, size, in_dims, *args)`` to the result and its mapped axis.
    """

    schema: str
    kernel: Callable[..., Tensor]
    fake: Callable[..., Tensor]
    composite: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor | None, Tensor | None]]
    vmap: Callable[..., tuple[Tensor, int]]


def register(family: Mapping[str, Bilinear], uses: Functions | None = None) -> Functions:
    """Register the members as ``torch.ops.bsfast.<name>`` and make their differentiable functions.

    Args:
        family: The operators by name; their formulas may use one another by these names.
        uses: What this function returned for another family that the formulas use.

    Returns:
        By name, a function of the operator's positional arguments that every transform of torch can go through.
    """
    functions: dict[str, Callable[..., Tensor]] = dict(uses or {})
    raw: dict[str, Callable[..., Tensor]] = {name: getattr(torch.ops.bsfast, name) for name in functions}
    for name, operator in family.items():
        raw[name] = _register_raw(name, operator, raw)
        functions[name] = _differentiable(operator, raw[name], functions)
    return {name: functions[name] for name in family}


def _register_raw(name: str, operator: Bilinear, family: Functions) -> Callable[..., Tensor]:
    qualified = f"bsfast::{name}"
    LIBRARY.define(name + operator.schema, tags=(torch.Tag.needs_exact_strides,))
    LIBRARY.impl(name, _outside_autocast(operator.kernel), "CompositeExplicitAutograd")

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _backward(operator, family, ctx, grad)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return operator.vmap(family, info.batch_size, in_dims, *args)

    torch.library.register_fake(qualified, operator.fake, lib=LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=_setup_context, lib=LIBRARY)
    torch.library.register_vmap(qualified, vmap, lib=LIBRARY)
    raw: Callable[..., Tensor] = getattr(torch.ops.bsfast, name)
    return raw


def _differentiable(operator: Bilinear, raw: Callable[..., Tensor], family: Functions) -> Callable[..., Tensor]:
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return raw(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _setup_context(ctx, inputs, output)
            ctx.save_for_forward(*inputs[:2])
            ctx.set_materialize_grads(False)  # a tangent of zeros would cost a convolution

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
            return (None,) * (2 + len(ctx.rest)) if grad is None else _backward(operator, family, ctx, grad)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            (a, b), (da, db) = ctx.saved_tensors, tangents[:2]
            terms = [call(da, b, *ctx.rest)] if da is not None else []
            terms += [call(a, db, *ctx.rest)] if db is not None else []
            return terms[0] if len(terms) == 1 else terms[0] + terms[1]

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
            return operator.vmap(family, info.batch_size, in_dims, *args)

    apply: Callable[..., Tensor] = Op.apply
    composite = _outside_autocast(operator.composite)

    def call(*args: Any) -> Tensor:
        # torch's Function.jvp is silently wrong under two or more forward-mode levels.
        return composite(*args) if forward_mode_levels() > 1 else apply(*args)

    return torch.compiler.allow_in_graph(call)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch's signature)
    ctx.save_for_backward(*inputs[:2])
    ctx.rest = inputs[2:]


def _backward(operator: Bilinear, family: Functions, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = operator.backward(family, ctx.needs_input_grad, grad, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *[None] * len(ctx.rest))


def _outside_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep autocast from changing the dtype of a result: the public functions have cast already."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any) -> Tensor:
        if not autocasts(first.device.type):
            return function(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return run


def autocasts(device: str) -> bool:
    """Say whether autocast is on for a device type."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def taken_dtype(operand: Tensor) -> torch.dtype:
    """Say in which dtype a convolution takes an operand: autocast casts floating-point ones, float64 excepted."""
    device, own = operand.device.type, operand.dtype
    casts = autocasts(device) and operand.is_floating_point() and own != torch.float64
    return torch.get_autocast_dtype(device) if casts else own
