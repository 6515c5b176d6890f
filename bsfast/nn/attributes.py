"""The Python attributes of modules: forward code that changes them cannot be fused, so changes are found."""

import io
import pickle
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

OF_TORCH = frozenset(vars(nn.Module()))  # parameters, buffers, modules, hooks, training: handled by name elsewhere
# torch.fx's names for tensors that a forward makes, and the list of its own tensors that an LSTM keeps.
_OF_OTHERS = ("_tensor_constant", "_flat_weight")
_PLAIN = {bool, int, str, type(None)}
_BY_IDENTITY = (Tensor, nn.Module, fx.Proxy, type, FunctionType, BuiltinFunctionType, ModuleType)

Snapshot = dict[tuple[str, str], Any]


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that a module's class or user added to those of every ``nn.Module``."""
    return {
        name: value for name, value in vars(module).items() if name not in OF_TORCH and not name.startswith(_OF_OTHERS)
    }


def attributes_of(root: nn.Module) -> Snapshot:
    """Note every module's attributes and all they hold.

    Args:
        root: Any module.

    Returns:
        By module path and attribute name, something that differs once the attribute has changed.
    """
    return {
        (path, name): (type(value), value) if type(value) in _PLAIN else _Mark(value)
        for path, module in root.named_modules()
        for name, value in own_attributes(module).items()
    }


def refuse_changed_attributes(before: Snapshot, after: Snapshot) -> None:
    """Raise if a forward changed an attribute: fused, the change would be lost or seen by one branch only.

    Args:
        before: Attributes before the forward.
        after: And after it.

    Raises:
        ValueError: If they differ.
    """
    for path, name in changed_attributes(before, after):
        raise ValueError(
            f"fuse: forward must not change Python attributes, got a change of {name!r} in "
            f"{path or 'the branch'!r}; register a buffer, and draw random numbers by torch.randn_like and its like"
        )


def changed_attributes(before: Snapshot, after: Snapshot) -> list[tuple[str, str]]:
    """Module paths and names of the attributes that differ."""
    both = dict.fromkeys([*after, *before])
    return [key for key in both if key not in before or key not in after or after[key] != before[key]]


class _Mark:
    """What a value holds, as bytes; equal to that of an unchanged value.

    Everything is compared by content (random generators, iterators and arrays included), but tensors, modules and
    functions by identity, and tensors by the number of writes that torch has counted.
    """

    def __init__(self, value: Any) -> None:
        held = io.BytesIO()
        pickler = _Pickler(held)
        pickler.dump(value)
        self.content = held.getvalue()
        self.kept = pickler.kept  # alive, so that their ids are their own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]


class _Pickler(pickle.Pickler):
    """Writes what cannot be pickled, and what is compared by identity, as a number."""

    def __init__(self, held: io.BytesIO) -> None:
        super().__init__(held, protocol=4)
        self.kept: list[Any] = []

    def reducer_override(self, value: Any) -> Any:
        if value is tuple:  # the name below
            return NotImplemented
        if isinstance(value, torch.Generator):
            return tuple, (value.get_state().tolist(),)
        if not isinstance(value, _BY_IDENTITY):
            try:
                return value.__reduce_ex__(4)
            except Exception:  # noqa: S110 (whatever its class raises: it cannot be pickled)
                pass
        self.kept.append(value)
        return tuple, ((id(value), version_of(value) if isinstance(value, Tensor) else 0),)


def version_of(tensor: Tensor) -> int:
    """Count the writes into a tensor so far, where torch counts them."""
    return 0 if tensor.is_inference() else tensor._version
