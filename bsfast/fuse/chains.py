"""Chains of steps that one kernel computes: batch normalisation, then perhaps a sum with another value, then a ReLU."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from bsfast.fuse.function_rules import as_written
from bsfast.fuse.steps import Ref, Step
from bsfast.fuse.values import PerBranch
from bsfast.nn import BatchNorm

_ADD = {operator.add, torch.add, "add"}
_RELU = {F.relu, torch.relu, "relu"}


class Chain(NamedTuple):
    """Steps that run as one.

    Attributes:
        parts: The steps, in order; the first is a batch normalisation.
        residual: Whether a sum is among them.
        relu: Whether a ReLU is.
    """

    parts: tuple[Step, ...]
    residual: bool
    relu: bool


def join(steps: Sequence[Step], net: nn.Module) -> tuple[Step, ...]:
    """Replace chains by one step each, at the place of their last.

    Args:
        steps: A program.
        net: Its module tree.

    Returns:
        An equivalent program; its steps of a chain have ``op`` ``"chain"`` and the arguments (input, residual or None).
    """
    users: dict[str, list[Step]] = {step.name: [] for step in steps}
    for step in steps:
        for ref in _refs(step):
            users[ref.name].append(step)
    at_end: dict[str, Step] = {}
    gone: set[str] = set()
    for step in steps:
        is_norm = step.op == "call_module" and step.target and type(net.get_submodule(step.target)) is BatchNorm
        if is_norm and len(step.args) == 1 and isinstance(step.args[0], Ref) and not step.kwargs:
            chain = _chain_from(step, users, net)
            names = {part.name for part in chain.parts}
            if len(names) > 1 and not names & gone:
                at_end[chain.parts[-1].name] = _as_step(chain)
                gone |= names
    return tuple(_renewed([at_end.get(step.name, step) for step in steps if step.name not in gone - at_end.keys()]))


def _chain_from(step: Step, users: dict[str, list[Step]], net: nn.Module) -> Chain:
    """Follow a normalisation's value through a sum and a ReLU, as long as nothing else takes it."""
    parts, residual, relu = [step], False, False
    after = _only_users(step, users)
    if after and _is_sum(after[0]):
        parts, residual = [*parts, *after], True
        after = _only_users(parts[-1], users)
    if after and _is_relu(after[0], net):
        parts, relu = [*parts, *after], True
    return Chain(tuple(parts), residual, relu)


def _only_users(step: Step, users: dict[str, list[Step]]) -> list[Step]:
    """The one step that takes a value, and what puts its result in the value's place, if it was written so."""
    own = users[step.name]
    if len(own) == 1:
        return own
    written = (own[1].target, own[1].args) if len(own) == 2 else None
    if written == (as_written, (Ref(own[0].name), Ref(step.name))) and users[own[0].name] == [own[1]]:
        return own
    return []


def _is_sum(step: Step) -> bool:
    is_add = step.op in {"call_function", "call_method"} and step.target in _ADD
    return is_add and len(step.args) == 2 and not step.kwargs and all(isinstance(ref, Ref) for ref in step.args)


def _is_relu(step: Step, net: nn.Module) -> bool:
    if step.op == "call_module":
        return bool(step.target) and type(net.get_submodule(step.target)) is nn.ReLU
    return step.op in {"call_function", "call_method"} and step.target in _RELU and len(step.args) == 1


def _as_step(chain: Chain) -> Step:
    names = {part.name for part in chain.parts}
    others = [ref for part in chain.parts if _is_sum(part) for ref in part.args if ref.name not in names]
    arguments = (chain.parts[0].args[0], others[0] if others else None)
    return replace(chain.parts[-1], op="chain", target=chain, args=arguments, kwargs={})


def _renewed(steps: Sequence[Step]) -> Iterator[Step]:
    """Say anew after which step each value is needed no more."""
    last_use = {name: step.name for step in steps for name in (step.name, *(ref.name for ref in _refs(step)))}
    for step in steps:
        yield replace(step, last_use_of=tuple(name for name, user in last_use.items() if user == step.name))


def _refs(step: Step) -> list[Ref]:
    leaves = pytree.tree_leaves((step.args, step.kwargs), is_leaf=lambda leaf: isinstance(leaf, Ref))
    return [leaf for leaf in leaves if isinstance(leaf, Ref)] + _slices(step)


def _slices(step: Step) -> list[Ref]:
    found = []
    for leaf in pytree.tree_leaves((step.args, step.kwargs)):
        if isinstance(leaf, slice):
            found += [part for part in (leaf.start, leaf.stop, leaf.step) if isinstance(part, Ref)]
    return found


def fits_one_kernel(x: Any, residual: Any) -> bool:
    """Whether one kernel can take the values of a chain: per-branch, alike in shape, dtype and device."""
    values = [x] if residual is None else [x, residual]
    if not all(isinstance(value, PerBranch) for value in values):
        return False
    kinds = {(value.tensor.shape, value.tensor.dtype, value.tensor.device) for value in values}
    return len(kinds) == 1
