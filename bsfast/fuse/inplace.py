"""In-place operations in forward code, rewritten as out-of-place ones with the same meaning, or refused."""

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from bsfast.fuse.function_rules import CloneThen, as_written, pointwise
from bsfast.fuse.functions import FUNCTIONS, MAY_ALIAS, overloads_of

# ``x += y`` and its like: the function that Python calls, and its out-of-place form.
AUGMENTED = {
    getattr(operator, f"i{name}"): getattr(operator, f"{name}_" if name in {"and", "or"} else name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
}


class Untraceable(Exception):  # noqa: N818 (not an error: the module runs by vmap)
    """A module whose forward cannot be recorded; ``path`` names it, ``reason`` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason


def remove_inplace(graph: fx.Graph) -> None:
    """Replace in-place operations; later uses of what they changed read their result instead.

    Args:
        graph: Traced graph of one branch; changed in place.

    Raises:
        ValueError: If an input is written to, or a view of the changed tensor is used later.
        Untraceable: If a parameter or buffer is written to.
    """  # noqa: DOC502 (raised by _refuse_foreign)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(order):
        if node.kwargs.get("out") is not None:
            raise ValueError(f"fuse: forward must not use out=, got it at {node.name!r}; use the returned tensor")
        replacement = _out_of_place(node)
        if replacement is None:
            continue
        changed = node.args[0] if node.args else node.kwargs["input"]
        _refuse_foreign(node, changed, order)
        node.op, node.target = replacement
        if node.op != "call_module":
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        if node.op == "call_function" and "inplace" in _positional(node.target)[: len(node.args)]:
            at = _positional(node.target).index("inplace")
            node.args = (*node.args[:at], False, *node.args[at + 1 :])
        result = _keep_type(node, changed)
        order[result] = order[node]
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, result)


def _keep_type(node: fx.Node, changed: fx.Node) -> fx.Node:
    """Give the result the shape and dtype of what was written to; out of place, arithmetic may promote it."""
    if FUNCTIONS.get(node.target) is not pointwise:
        return node
    users = list(node.users)
    with node.graph.inserting_after(node):
        result = node.graph.call_function(as_written, (node, changed))
    result.meta["scope"] = node.meta.get("scope", "")
    for user in users:
        user.replace_input_with(node, result)
    return result


def _out_of_place(node: fx.Node) -> tuple[str, Any] | None:  # noqa: PLR0911 (one return a kind)
    """Return (op, target) of the out-of-place form of a node, or None if it changes nothing."""
    target = node.target
    if node.op == "call_module" and node.meta["inplace"]:
        return "call_module", target  # our layers are never in-place
    if node.op == "call_method":
        name = str(target)
        if not name.endswith("_") or name.endswith("__"):
            return None
        has_twin = callable(getattr(torch.Tensor, name[:-1], None))
        return ("call_method", name[:-1]) if has_twin else ("call_function", CloneThen(name))
    if node.op != "call_function":
        return None
    if target in AUGMENTED:
        return "call_function", AUGMENTED[target]
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


def _refuse_foreign(node: fx.Node, changed: Any, order: dict[fx.Node, int]) -> None:
    """Refuse to change what is not the branch's own, or what is visible through another name later."""
    for member in _aliases(changed, before=node, order=order):
        if member.op == "placeholder":
            raise ValueError(
                f"fuse: forward must not write into its input, got in-place {node.name!r} on input {member.name!r}; "
                "use the out-of-place form"
            )
        if member.op == "get_attr":
            raise Untraceable(node.meta.get("scope", ""), f"it writes into {member.target!r}")
        if member is not changed and any(order[user] > order[node] for user in member.users):
            raise ValueError(
                f"fuse: a tensor changed in place must not have views that are used later, got in-place {node.name!r} "
                f"on {changed.name!r}, which may share memory with {member.name!r}; use the out-of-place form"
            )


def _aliases(node: fx.Node, before: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """Nodes ahead of ``before`` that may share memory with a node, including itself."""
    family, queue = {node}, [node]
    while queue:
        member = queue.pop()
        near = [source for source in member.all_input_nodes if may_alias(member)]
        near += [user for user in member.users if may_alias(user) and order[user] < order[before]]
        queue += [other for other in near if other not in family]
        family |= set(near)
    return family


def may_alias(node: fx.Node) -> bool:
    """Say whether a node's result may share memory with its inputs; unknown functions and modules may."""
    if node.op == "call_module":
        return bool(node.meta["may_alias"])
    if node.op not in {"call_function", "call_method"}:
        return False
    if node.target is getattr:
        return node.args[1] not in {"shape", "ndim", "dtype", "device"}
    if node.target in MAY_ALIAS or isinstance(node.target, CloneThen):
        return node.target in MAY_ALIAS
    if FUNCTIONS.get(node.target) is pointwise:
        return False
    return _schema_allows_view(getattr(node.target, "__name__", str(node.target)))


def _schema_allows_view(name: str) -> bool:
    """Say whether the stock operator of this name may return a view of an argument."""
    overloads = overloads_of(name)
    returns = [result.alias_info for overload in overloads for result in overload._schema.returns]
    return not overloads or any(alias is not None and not alias.is_write for alias in returns)
