"""One step of a program, and how it refers to the values of others."""

from dataclasses import dataclass
from typing import Any, NamedTuple


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
