"""In-place operations in forward code, rewritten as out-of-place ones with the same meaning, or refused."""

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from bsfast.fuse.functions import FUNCTIONS, MAY_ALIAS, join, numel, pointwise, rank, samplewise, size

_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
}


def remove_inplace(graph: fx.Graph) -> None:
    """Replace in-place operations; later uses of what they changed read their result instead.

    Args:
        graph: Traced graph of one branch; changed in place.

    Raises:
        ValueError: If an input or parameter is written to, or a view of the changed tensor is used later.
    """
    for node in graph.nodes:
        replacement = _out_of_place(node)
        if replacement is None:
            continue
        changed = node.args[0] if node.args else node.kwargs["input"]
        _refuse_foreign(node, changed)
        node.op, node.target, node.kwargs = *replacement, {k: v for k, v in node.kwargs.items() if k != "inplace"}
        if node.op == "call_function" and "inplace" in _positional(node.target)[: len(node.args)]:
            at = _positional(node.target).index("inplace")
            node.args = (*node.args[:at], False, *node.args[at + 1 :])
        order = {other: position for position, other in enumerate(graph.nodes)}
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)


def _out_of_place(node: fx.Node) -> tuple[str, Any] | None:
    """Return (op, target) of the out-of-place form of a node, or None if it changes nothing."""
    target = node.target
    if node.op == "call_method":
        name = str(target)
        if not name.endswith("_") or name.endswith("__"):
            return None
        return ("call_method", name[:-1]) if hasattr(torch.Tensor, name[:-1]) else ("call_function", CloneThen(name))
    if node.op != "call_function":
        return None
    if target in _OPERATORS:
        return "call_function", _OPERATORS[target]
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        for home in (F, torch):
            if getattr(home, name, None) is target and hasattr(home, name[:-1]):
                return "call_function", getattr(home, name[:-1])
    if node.kwargs.get("inplace") or _positional_inplace(node):
        return "call_function", target
    return None


def _positional(target: Any) -> list[str]:
    try:
        return list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # builtins of torch have no signature, and no inplace argument either
        return []


def _positional_inplace(node: fx.Node) -> bool:
    names = _positional(node.target)
    return "inplace" in names[: len(node.args)] and bool(node.args[names.index("inplace")])


class CloneThen:
    """An in-place method without an out-of-place twin, such as ``uniform_``, applied to a copy."""

    def __init__(self, method: str) -> None:
        self.__name__ = method
        self.method = method

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply to a clone."""
        return getattr(x.clone(), self.method)(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CloneThen) and other.method == self.method

    def __hash__(self) -> int:
        return hash(self.method)


def _refuse_foreign(node: fx.Node, changed: Any) -> None:
    """Refuse to change what is not the branch's own, or what is visible through another name later."""
    order = {other: position for position, other in enumerate(node.graph.nodes)}
    for member in _aliases(changed, before=node, order=order):
        if member.op == "placeholder":
            raise ValueError(
                f"fuse: forward must not write into its input, got in-place {node.name!r} on input {member.name!r}; "
                "use the out-of-place form"
            )
        if member.op == "get_attr":
            raise ValueError(
                f"fuse: forward must not write into parameters or buffers, got in-place {node.name!r} on "
                f"{member.target!r}"
            )
        if member is not changed and any(order[user] > order[node] for user in member.users):
            raise ValueError(
                f"fuse: a tensor changed in place must not have views that are used later, got in-place {node.name!r} on "
                f"{changed.name!r}, which may share memory with {member.name!r}; use the out-of-place form"
            )


def _aliases(node: fx.Node, before: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """Nodes ahead of ``before`` that may share memory with a node, including itself."""
    family, queue = {node}, [node]
    while queue:
        member = queue.pop()
        near = [source for source in member.all_input_nodes if _may_alias(member)]
        near += [user for user in member.users if _may_alias(user) and order[user] < order[before]]
        queue += [other for other in near if other not in family]
        family |= set(near)
    return family


def _may_alias(node: fx.Node) -> bool:
    """Say whether a node's result may share memory with its inputs; unknown functions and modules may."""
    if node.op == "call_module":
        return bool(node.meta["may_alias"])
    if node.op not in {"call_function", "call_method"}:
        return False
    if node.target is getattr and node.args[1] in {"shape", "ndim", "dtype", "device"}:
        return False
    rule = FUNCTIONS.get(node.target)
    return node.target in MAY_ALIAS or rule not in {pointwise, samplewise, size, rank, numel, join}
