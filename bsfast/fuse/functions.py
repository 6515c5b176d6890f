"""Which rule of :mod:`bsfast.fuse.function_rules` a function in forward code has; methods are listed by name."""

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F

from bsfast.fuse import function_rules as rules
from bsfast.nn import functional

_UNARY = """abs acos acosh asin asinh atan atanh ceil clamp clip clamp_min clamp_max clone cos cosh detach erf exp expm1
floor frac log log10 log1p log2 neg negative positive reciprocal relu round rsqrt sigmoid sign sin sinh sqrt square tan
tanh trunc nan_to_num zeros_like ones_like"""
_BINARY = """add sub mul div true_divide floor_divide remainder fmod pow maximum minimum where lerp addcmul addcdiv
eq ne lt le gt ge logical_and logical_or logical_not xlogy atan2 heaviside hypot"""
_METHODS = "float half double bfloat16 bool int long type rsub multiply subtract divide"
_ACTIVATIONS = """relu relu6 leaky_relu elu celu selu gelu silu mish softplus softsign tanhshrink softshrink hardshrink
hardtanh hardsigmoid hardswish logsigmoid threshold rrelu sigmoid tanh dropout alpha_dropout"""
_SAMPLEWISE = """max_pool1d max_pool3d avg_pool1d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool3d pixel_shuffle pixel_unshuffle dropout1d dropout2d dropout3d feature_alpha_dropout
local_response_norm"""
_PLANEWISE = """max_pool2d max_pool2d_with_indices avg_pool2d lp_pool2d adaptive_max_pool2d
adaptive_max_pool2d_with_indices interpolate"""
_OPERATORS = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
    *(operator.neg, operator.pos, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.and_, operator.or_, operator.xor, operator.invert),
)
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
# May return their input itself, whatever their schema says; in-place code must know (bsfast/fuse/inplace.py).
MAY_ALIAS: set[Any] = _DROPOUTS | rules.BY_CHANNEL_GROUPS | {torch.positive, torch.detach, torch.einsum, operator.pos}
MAY_ALIAS |= {
    "to",
    "float",
    "half",
    "double",
    "bfloat16",
    "bool",
    "int",
    "long",
    "type",
    "type_as",
    "detach",
    "positive",
    "einsum",
}


def _table() -> dict[Any, rules.Rule]:
    table: dict[Any, rules.Rule] = dict.fromkeys(_OPERATORS, rules.pointwise)
    for name in f"{_UNARY} {_BINARY} {_METHODS}".split():
        table[name] = rules.pointwise
        if hasattr(torch, name):
            table[getattr(torch, name)] = rules.pointwise
    for name in _ACTIVATIONS.split():
        table[getattr(F, name)] = rules.pointwise
    for name in _SAMPLEWISE.split():
        table[getattr(F, name)] = rules.samplewise
        if hasattr(torch, name):
            table[getattr(torch, name)] = rules.samplewise
    for name in _PLANEWISE.split():
        table[getattr(F, name)] = rules.planewise
    for name in ("mean", "sum", "amax", "amin", "softmax", "log_softmax", "var", "std", "logsumexp"):
        table |= {name: rules.over_axes, getattr(torch, name): rules.over_axes, getattr(F, name, name): rules.over_axes}
    for name, rule in {
        "unsqueeze": rules.axes_from(1, new=1),
        "transpose": rules.axes_from(1),
        "chunk": rules.axes_from(2, default=(0,)),
        "permute": rules.permute,
        "reshape": rules.reshape,
        "flatten": rules.flatten,
        "numel": rules.numel,
    }.items():
        table |= {name: rule, getattr(torch, name): rule}
    table |= {torch.cat: rules.join, torch.concat: rules.join, torch.concatenate: rules.join, torch.stack: rules.join}
    table |= {
        "view": rules.reshape,
        "view_as": rules.reshape,
        "reshape_as": rules.reshape,
        rules.as_written: rules.written,
    }
    table |= {"size": rules.size, "dim": rules.rank, "ndimension": rules.rank, "contiguous": rules.unchanged}
    table |= {F.pad: rules.pad, "to": rules.cast, "type_as": rules.cast}
    table |= {getattr: rules.attribute, operator.getitem: rules.item}
    table |= {
        F.conv2d: rules.own(functional.conv2d, ("weight", "bias"), takes_shared=True),
        torch.conv2d: rules.own(functional.conv2d, ("weight", "bias"), takes_shared=True),
        F.adaptive_avg_pool2d: rules.own(functional.adaptive_avg_pool2d, ()),
        F.linear: rules.own(functional.linear, ("weight", "bias"), takes_shared=True),
        F.batch_norm: rules.own(functional.batch_norm, ("running_mean", "running_var", "weight", "bias")),
        F.instance_norm: rules.own(functional.instance_norm, ("running_mean", "running_var", "weight", "bias")),
        F.group_norm: rules.own(functional.group_norm, ("weight", "bias")),
        F.layer_norm: rules.own(functional.layer_norm, ("weight", "bias")),
        F.embedding: rules.own(functional.embedding, ("weight",)),
        F.prelu: rules.own(functional.prelu, ("weight",)),
        torch.prelu: rules.own(functional.prelu, ("weight",)),
    }
    return table


FUNCTIONS: dict[Any, rules.Rule] = _table()

# Functions of Python that draw random numbers; stock operators say so themselves.
_RANDOM: set[Any] = {
    *_DROPOUTS,
    *(F.rrelu, F.gumbel_softmax, F.multi_head_attention_forward, torch.svd_lowrank, torch.pca_lowrank),
    *(F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices),
    *(F.fractional_max_pool3d, F.fractional_max_pool3d_with_indices),
}


def is_random(target: Any) -> bool:
    """Say whether a function draws random numbers: it runs per branch even on inputs that all branches share.

    Args:
        target: Function, or name of a method.

    Returns:
        Whether it does, as its operator's tag says; False for Python code of others that calls such an operator.
    """
    if target in _RANDOM:
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads_of(name))


@functools.lru_cache(maxsize=1024)
def overloads_of(name: str) -> tuple[Any, ...]:
    """Stock operators of a name; none if there is none."""
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("__") else None
    return tuple(getattr(packet, overload) for overload in packet.overloads()) if packet is not None else ()
