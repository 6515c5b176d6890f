"""Which argument of ``forward`` is what: tensors that flow through the graph, and constants that it is traced for."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from bsfast.fuse.values import PerBranch, leaves_of

Key = tuple[tuple[str, type, Any], ...]
_REQUIRED = inspect.Parameter.empty


class Arguments:
    """The parameters of one branch's ``forward``.

    Attributes:
        defaults: Default value by name, in order.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.defaults: dict[str, Any] = {}
        self._positional: list[str] = []
        for name, parameter in inspect.signature(forward).parameters.items():
            if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
                raise ValueError(f"fuse: forward must have a fixed list of arguments, got *{name}")
            self.defaults[name] = parameter.default
            if parameter.kind != parameter.KEYWORD_ONLY:
                self._positional.append(name)

    def default_constants(self) -> dict[str, Any]:
        """Constants of a call that gives only what it must."""
        return {name: v for name, v in self.defaults.items() if v is not _REQUIRED and not holds_tensors(v)}

    def bind(
        self, inputs: tuple[Any, ...], per_branch: bool | Sequence[bool], named: dict[str, Any], branches: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Match arguments to names.

        Args:
            inputs: Positional arguments.
            per_branch: Whether their tensors are stacked, for all or for each of them.
            named: Named arguments; stacked if ``per_branch`` is True.
            branches: M.

        Returns:
            Values that hold tensors, with stacked ones marked, and constants; by name.

        Raises:
            TypeError: If an argument is missing, unknown or given twice.
            ValueError: If ``per_branch`` has another length than ``inputs``.
        """
        if len(inputs) > len(self._positional):
            raise TypeError(
                f"Branched: forward must get at most {len(self._positional)} inputs {self._positional}, "
                f"got {len(inputs)}"
            )
        flags = [per_branch] * len(inputs) if isinstance(per_branch, bool) else list(per_branch)
        if len(flags) != len(inputs):
            raise ValueError(
                f"Branched: per_branch must be a bool or one a positional input ({len(inputs)}), got {flags}"
            )
        given = {name: (value, flag) for name, value, flag in zip(self._positional, inputs, flags, strict=False)}
        for name, value in named.items():
            if name in given or name not in self.defaults:
                raise TypeError(f"Branched: forward must get each of {list(self.defaults)} at most once, got {name!r}")
            given[name] = (value, per_branch is True)
        values, constants = {}, {}
        for name, default in self.defaults.items():
            value, stacked = given.get(name, (default, False))
            if value is _REQUIRED:
                raise TypeError(f"Branched: forward must get the input {name!r}, got {sorted(given)}")
            if holds_tensors(value):
                values[name] = _mark(name, value, branches) if stacked else value
            else:
                constants[name] = value
        return values, constants


def holds_tensors(value: Any) -> bool:
    """Say whether a nested argument holds a tensor."""
    return any(isinstance(leaf, Tensor) for leaf in leaves_of(value))


def key_of(constants: dict[str, Any]) -> Key:
    """Make constants a dictionary key; True, 1 and 1.0 differ.

    Args:
        constants: Arguments without tensors, by name.

    Returns:
        The key.

    Raises:
        TypeError: If a value cannot be hashed.
    """
    for name, value in constants.items():
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(f"Branched: {name} must be a tensor or hashable, got {type(value).__name__}") from error
    return tuple((name, type(value), value) for name, value in constants.items())


def _mark(name: str, value: Any, branches: int) -> Any:
    def mark(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0 or leaf.shape[0] != branches:
            raise ValueError(
                f"Branched: {name} must have shape (M={branches}, N, ...) with per_branch, got {tuple(leaf.shape)}"
            )
        return PerBranch(leaf)

    return pytree.tree_map(mark, value)
