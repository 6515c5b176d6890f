"""Chains of steps that run as one: convolution and batch normalisation, a sum with another value, a ReLU."""

import operator
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bsfast.fuse.function_rules import as_written
from bsfast.fuse.steps import Ref, Step, module_at, refs, renewed
from bsfast.nn import BatchNorm, Conv2d

_ADD = {operator.add, torch.add, "add"}
_RELU = {F.relu, torch.relu, "relu"}


class Chain(NamedTuple):
    """Steps that run as one.

    With the statistics of the batch: a normalisation, then a sum or nothing, then a ReLU or nothing, then, if there is
    no sum, a convolution that takes the result or nothing; or a convolution alone that describes its result for a
    normalisation. With running statistics: a convolution, then perhaps each of normalisation, sum and ReLU.

    Attributes:
        parts: The steps, in order.
        norm: Path of the batch normalisation, or None.
        conv: Path of the convolution, or None.
        residual: Whether a sum is among them.
        relu: Whether a ReLU is.
    """

    parts: tuple[Step, ...]
    norm: str | None
    conv: str | None
    residual: bool
    relu: bool

    @property
    def norm_first(self) -> bool:
        """Whether the normalisation comes before everything else."""
        return self.parts[0].target == self.norm

    @property
    def describes(self) -> bool:
        """Whether it ends with a convolution that gives the statistics of its result, too."""
        return self.parts[-1].target == self.conv


def join(steps: Sequence[Step], net: nn.Module) -> tuple[Step, ...]:
    """Replace chains by one step each, at the place of their last.

    Args:
        steps: A program.
        net: Its module tree, in the mode of the program.

    Returns:
        An equivalent program; its steps of a chain have ``op`` ``"chain"`` and the arguments (input, residual or None).
    """
    users: dict[str, list[Step]] = {step.name: [] for step in steps}
    for step in steps:
        for ref in refs(step):
            users[ref.name].append(step)
    finder = _Finder(users, net)
    at_end: dict[str, Step] = {}
    gone: set[str] = set()
    starts = [step for step in steps if finder.is_norm(step)] + [step for step in steps if finder.is_conv(step)]
    for step in starts:
        chain = None if step.name in gone else finder.chain_from(step, gone)
        if chain:
            at_end[chain.parts[-1].name] = _as_step(chain)
            gone |= {part.name for part in chain.parts}
    return tuple(renewed([at_end.get(step.name, step) for step in steps if step.name not in gone - at_end.keys()]))


class _Finder:
    """Looks for chains in a program."""

    def __init__(self, users: dict[str, list[Step]], net: nn.Module) -> None:
        self.users = users
        self.net = net

    def chain_from(self, step: Step, gone: Set[str]) -> Chain | None:
        """Follow a value as long as nothing else takes it, nor other chains its steps; None if nothing is won."""
        parts, norm, conv, residual, relu = [step], None, None, False, False
        if self.is_norm(step):
            norm = step.target
            if not self._module(step).uses_batch:
                return None
        else:
            conv = step.target
            after = self._only_users(parts[-1], gone)
            if after and self.is_norm(after[0]) and not self._module(after[0]).uses_batch:
                parts, norm = [*parts, *after], after[0].target
            elif any(self.is_norm(user) and self._module(user).uses_batch for user in self.users[step.name]):
                return Chain(tuple(parts), None, conv, residual=False, relu=False)
        after = self._only_users(parts[-1], gone)
        if after and _is_sum(after[0]):
            parts, residual = [*parts, *after], True
            after = self._only_users(parts[-1], gone)
        if after and self._is_relu(after[0]):
            parts, relu = [*parts, *after], True
            after = self._only_users(parts[-1], gone)
        if conv is None and not residual and after and self.is_conv(after[0]):
            parts, conv = [*parts, *after], after[0].target
        return Chain(tuple(parts), norm, conv, residual, relu) if len(parts) > 1 else None

    def is_norm(self, step: Step) -> bool:
        """Whether a step normalises one value over the batch."""
        return self._is_layer(step, BatchNorm)

    def is_conv(self, step: Step) -> bool:
        """Whether a step convolves one value, with zeros around it."""
        if not self._is_layer(step, Conv2d):
            return False
        own: Any = self._module(step).settings
        return own.padding_mode == "zeros" and not isinstance(own.padding, str)

    def _is_layer(self, step: Step, kind: type[nn.Module]) -> bool:
        is_layer = step.op == "call_module" and bool(step.target) and type(self._module(step)) is kind
        return is_layer and len(step.args) == 1 and isinstance(step.args[0], Ref) and not step.kwargs

    def _is_relu(self, step: Step) -> bool:
        if step.op == "call_module":
            return bool(step.target) and type(self._module(step)) is nn.ReLU
        return step.op in {"call_function", "call_method"} and step.target in _RELU and len(step.args) == 1

    def _module(self, step: Step) -> nn.Module:
        return module_at(self.net, step.target)

    def _only_users(self, step: Step, gone: Set[str]) -> list[Step]:
        """The one step that takes a value, and what puts its result in the value's place, if it was written so."""
        own = self.users[step.name]
        if any(user.name in gone for user in own):
            return []
        if len(own) == 1:
            return own
        if len(own) != 2 or self.users[own[0].name] != [own[1]]:
            return []
        written = (own[1].target, own[1].args) == (as_written, (Ref(own[0].name), Ref(step.name)))
        return own if written else []


def _is_sum(step: Step) -> bool:
    is_add = step.op in {"call_function", "call_method"} and step.target in _ADD
    return is_add and len(step.args) == 2 and not step.kwargs and all(isinstance(ref, Ref) for ref in step.args)


def _as_step(chain: Chain) -> Step:
    names = {part.name for part in chain.parts}
    others = [ref for part in chain.parts if _is_sum(part) for ref in part.args if ref.name not in names]
    arguments = (chain.parts[0].args[0], others[0] if others else None)
    return replace(chain.parts[-1], op="chain", target=chain, args=arguments, kwargs={})
