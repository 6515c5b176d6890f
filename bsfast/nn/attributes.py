"""The Python attributes of modules: forward code that changes them cannot be fused, so changes are found."""

from typing import Any

from torch import Tensor, nn

OF_TORCH = frozenset(vars(nn.Module()))  # parameters, buffers, modules, hooks, training: handled by name elsewhere
# torch.fx's names for tensors that a forward makes, and the list of its own tensors that an LSTM keeps.
_OF_OTHERS = ("_tensor_constant", "_flat_weight")
PLAIN = (int, float, complex, str, bytes, bool, type(None))

Snapshot = dict[tuple[str, str], Any]


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that a module's class or user added to those of every ``nn.Module``."""
    return {
        name: value for name, value in vars(module).items() if name not in OF_TORCH and not name.startswith(_OF_OTHERS)
    }


def attributes_of(root: nn.Module) -> Snapshot:
    """Note every module's attributes, and what containers and plain objects among them hold.

    Args:
        root: Any module.

    Returns:
        By module path and attribute name, something that differs once the attribute has changed.
    """
    return {
        (path, name): _mark_of(value, depth=2)
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
    for path, name in [*after, *before]:
        if (path, name) not in before or (path, name) not in after or after[path, name] != before[path, name]:
            raise ValueError(
                f"fuse: forward must not change Python attributes, got a change of {name!r} in "
                f"{path or 'the branch'!r}; register a buffer"
            )


class _Same:
    """An object, equal to itself only; keeps it alive, so that its id is its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _mark_of(value: Any, depth: int) -> Any:
    if isinstance(value, PLAIN):
        return type(value), repr(value)  # repr: nan equals itself, -0.0 is not 0.0
    inner: list[Any] = []
    if depth and isinstance(value, (list, tuple)):
        inner = list(value)
    elif depth and isinstance(value, dict):
        inner = [*value, *value.values()]
    elif depth and isinstance(value, (set, frozenset)):
        inner = sorted(value, key=id)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type)):
        inner = list(vars(value).values())
    return _Same(value), [_mark_of(entry, depth - 1) for entry in inner]
