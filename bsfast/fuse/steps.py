"""One step of a program, and how it refers to the values of others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from torch.utils import _pytree as pytree


class Ref(NamedTuple):
    """Reference to the value of an earlier step, or to a copy of it."""

    name: str
    copy: bool = False


@dataclass(frozen=True)
class Step:
    """One node of the graph.

    Attributes:
        op: As ``torch.fx.Node.op``.
        target: Name of an input, parameter, module or method, or a function.
        args: Positional arguments with :class:`Ref` for values.
        kwargs: Named arguments, likewise.
        name: The node's name.
        scope: Path of the module whose forward it belongs to.
        last_use_of: Values that no later step needs.
        is_random: Whether its function draws random numbers.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    scope: str
    last_use_of: tuple[str, ...]
    is_random: bool


def module_at(net: nn.Module, path: str) -> nn.Module:
    """As ``net.get_submodule(path)``, of which every call takes as long as a small operator."""
    module: Any = net
    for name in path.split("."):
        module = module._modules[name]
    found: nn.Module = module
    return found


def renewed(steps: Sequence[Step]) -> Iterator[Step]:
    """Say anew after which step each value is needed no more."""
    last_use = {name: step.name for step in steps for name in (step.name, *(ref.name for ref in refs(step)))}
    for step in steps:
        yield replace(step, last_use_of=tuple(name for name, user in last_use.items() if user == step.name))


def refs(step: Step) -> list[Ref]:
    """The values that a step takes."""
    leaves = pytree.tree_leaves((step.args, step.kwargs), is_leaf=lambda leaf: isinstance(leaf, Ref))
    return [leaf for leaf in leaves if isinstance(leaf, Ref)] + _slices(step)


def _slices(step: Step) -> list[Ref]:
    found = []
    for leaf in pytree.tree_leaves((step.args, step.kwargs)):
        if isinstance(leaf, slice):
            found += [part for part in (leaf.start, leaf.stop, leaf.step) if isinstance(part, Ref)]
    return found
