"""How module classes are fused: one row a class, and the users' own."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import bsfast.nn as bnn

Rule = Callable[[Sequence[Any]], nn.Module]

_RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: bnn.Conv2d.from_branches,
    nn.Linear: bnn.Linear.from_branches,
    nn.BatchNorm1d: bnn.BatchNorm.from_branches,
    nn.BatchNorm2d: bnn.BatchNorm.from_branches,
    nn.BatchNorm3d: bnn.BatchNorm.from_branches,
    nn.InstanceNorm2d: bnn.InstanceNorm2d.from_branches,
    nn.GroupNorm: bnn.GroupNorm.from_branches,
    nn.LayerNorm: bnn.LayerNorm.from_branches,
    nn.PReLU: bnn.PReLU.from_branches,
    nn.Dropout: bnn.copy_first,
    nn.AlphaDropout: bnn.copy_first,
    nn.RReLU: bnn.copy_first,
    nn.Dropout1d: bnn.Dropout1d.from_branches,
    nn.Dropout2d: bnn.Dropout2d.from_branches,
    nn.Dropout3d: bnn.Dropout3d.from_branches,
    nn.FeatureAlphaDropout: bnn.FeatureAlphaDropout.from_branches,
}
# Activations, pooling, Upsample, Flatten, Identity, Sequential, ... have no parameters and need no row: they are traced
# through to the functions they call, which bsfast/fuse/functions.py lists.

# Layers whose result never shares memory with their input.
_NEW_RESULT = {bnn.Conv2d, bnn.Linear, bnn.BatchNorm, bnn.InstanceNorm2d, bnn.GroupNorm, bnn.LayerNorm, bnn.PReLU}

_DESCRIPTIVE = {"__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__repr__", "extra_repr"}
_DESCRIPTIVE |= {"reset_parameters", "__constants__", "__static_attributes__", "__firstlineno__"}


def register_rule(module: type[nn.Module], rule: Rule) -> None:
    """Say how modules of a class are fused; replaces an earlier rule for the class.

    Register before fusing: a network that was made before knows nothing of it.

    Args:
        module: Class of the branches or of modules in them; subclasses that override a method are not covered.
        rule: Called with the M modules of one place in the branches, whose settings are equal; returns one new module
            whose ``forward`` takes what theirs does and returns the same, tensors with a leading branch axis, and
            whose parameters and buffers have the original names and axis 0 = M.
            :meth:`bsfast.nn.StackedModule.from_branches` of a subclass does the stacking.

    Raises:
        TypeError: If ``module`` is not a module class or ``rule`` cannot be called.
    """
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"register_rule: module must be a subclass of torch.nn.Module, got {module!r}")
    if not callable(rule):
        raise TypeError(f"register_rule: rule must be callable with a list of M modules, got {rule!r}")
    _RULES[module] = rule


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule of the nearest class whose behaviour the module has not overridden.

    Args:
        module: Module of a branch.

    Returns:
        The rule, or None.
    """
    for cls in type(module).__mro__:
        if cls in _RULES:
            return _RULES[cls]
        if set(vars(cls)) - _DESCRIPTIVE:
            return None
    return None


def may_return_input(module: nn.Module) -> bool:
    """Say whether a module that is not traced may return its input, or a view of it: in-place code must know."""
    return getattr(find_rule(module), "__self__", None) not in _NEW_RESULT
