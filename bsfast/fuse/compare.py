"""Are M branches one architecture? Each check names the first difference it finds."""

from collections.abc import Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from bsfast.nn.attributes import own_attributes
from bsfast.nn.stacked import tensors_of


def check_alike(branches: Sequence[nn.Module]) -> None:
    """Compare modules, modes, and tensors of M branches.

    Args:
        branches: M modules.

    Raises:
        ValueError: If a module's class or mode, or a tensor's name, shape, dtype, device, tie or ``requires_grad``
            differs, or two branches share a tensor.
    """
    first = branches[0]
    for k, branch in enumerate(branches[1:], start=1):
        _check_modules(first, branch, k)
        _check_tensors(tensors_of(first), tensors_of(branch), k)
        _check_ties(tensors_of(first), tensors_of(branch), k)
    owner: dict[int, tuple[int, str]] = {}
    for k, branch in enumerate(branches):
        for name, tensor in tensors_of(branch).items():
            other, _ = owner.setdefault(id(tensor), (k, name))
            if other != k:
                raise ValueError(
                    f"fuse: every branch must have its own parameters and buffers, got {name!r} shared by branches "
                    f"{other} and {k}; pass copies (copy.deepcopy)"
                )


def _check_modules(first: nn.Module, branch: nn.Module, k: int) -> None:
    ours, theirs = (dict(b.named_modules(remove_duplicate=False)) for b in (first, branch))
    _same_keys("the same modules", list(ours), list(theirs), k)
    for path, module in ours.items():
        other = theirs[path]
        if type(module) is not type(other):
            raise ValueError(
                f"fuse: branches must have the same modules, got {type(module).__name__} at {path!r} in branch 0 and "
                f"{type(other).__name__} in branch {k}"
            )
        if module.training != other.training:
            raise ValueError(
                f"fuse: branches must be in the same mode, got training={module.training} at {path or 'the top'!r} in "
                f"branch 0 and {other.training} in branch {k}; call train() or eval() on all"
            )


def _check_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], k: int) -> None:
    _same_keys("the same parameters and buffers", list(ours), list(theirs), k)
    for name, tensor in ours.items():
        other = theirs[name]
        for what in ("shape", "dtype", "device", "requires_grad"):
            a, b = getattr(tensor, what), getattr(other, what)
            if a != b:
                a, b = (tuple(v) if isinstance(v, torch.Size) else v for v in (a, b))
                raise ValueError(f"fuse: {name!r} must have one {what}, got {a} in branch 0 and {b} in branch {k}")


def _check_ties(ours: dict[str, Tensor], theirs: dict[str, Tensor], k: int) -> None:
    """Tensors under several names must be so in every branch."""
    leaders: list[dict[int, str]] = [{}, {}]
    for name in ours:
        a, b = (
            leader.setdefault(id(tensors[name]), name) for leader, tensors in zip(leaders, (ours, theirs), strict=True)
        )
        if a != b:
            raise ValueError(
                f"fuse: branches must tie the same parameters and buffers, got {name!r} tied to {a!r} in branch 0 and "
                f"to {b!r} in branch {k}"
            )


def _same_keys(rule: str, ours: list[str], theirs: list[str], k: int) -> None:
    if ours != theirs:
        only = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
        raise ValueError(
            f"fuse: branches must have {rule}, got only in branch 0: {only[0]}, only in branch {k}: {only[1]}"
            if any(only)
            else f"fuse: branches must have {rule} in the same order, got {ours} in branch 0 and {theirs} in branch {k}"
        )


def check_graphs(graphs: Sequence[fx.Graph | None]) -> None:
    """Compare the traced graphs of M branches node by node, constants included.

    Args:
        graphs: One a branch; all None if the branches run by vmap as a whole.

    Raises:
        ValueError: If a node's operation or an argument differs.
    """
    first = graphs[0]
    for k, graph in enumerate(graphs[1:], start=1):
        if (first is None) != (graph is None):
            raise ValueError(
                f"fuse: branches must compute the same, got branch 0 and branch {k} traceable only in part"
            )
        if first is None or graph is None:
            continue
        ours, theirs = list(first.nodes), list(graph.nodes)
        for a, b in zip(ours, theirs, strict=False):
            if (a.op, a.target) != (b.op, b.target):
                raise ValueError(
                    f"fuse: branches must compute the same, got {_say(a)} in branch 0 and {_say(b)} in branch {k}"
                )
            for name, (ours_arg, theirs_arg) in _arguments(a, b).items():
                if not _equal(ours_arg, theirs_arg):
                    raise ValueError(
                        f"fuse: branches must compute the same, got {_say(a)} with {name}={ours_arg!r} in branch 0 and "
                        f"{theirs_arg!r} in branch {k}"
                    )
        if len(ours) != len(theirs):
            raise ValueError(
                f"fuse: branches must compute the same, got {len(ours)} nodes in branch 0 and {len(theirs)} in branch "
                f"{k}"
            )


def _say(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    scope = node.meta.get("scope")
    return f"node {node.name!r} ({target}{f' in {scope!r}' if scope else ''})"


def _arguments(a: fx.Node, b: fx.Node) -> dict[str, tuple[Any, Any]]:
    positional = zip(_named(a.args), _named(b.args), strict=False)
    pairs = {f"argument {i}": pair for i, pair in enumerate(positional)}
    for name in sorted(set(a.kwargs) | set(b.kwargs)):
        pairs[name] = (_named(a.kwargs.get(name)), _named(b.kwargs.get(name)))
    pairs["the number of arguments"] = (len(a.args), len(b.args))
    return pairs


def _named(argument: Any) -> Any:
    return fx.node.map_arg(argument, lambda node: f"%{node.name}")


def check_settings(modules: Sequence[nn.Module], path: str) -> None:
    """Compare the settings (stride, eps, slope, ...) of the M modules of one place, submodules included.

    Args:
        modules: One a branch, of one class.
        path: Where they are, for the message.

    Raises:
        ValueError: If an attribute differs.
    """
    for k, module in enumerate(modules[1:], start=1):
        pairs = zip(modules[0].named_modules(), module.named_modules(), strict=True)
        for (inner, ours), (_, theirs) in pairs:
            for name in sorted(own_attributes(ours).keys() | own_attributes(theirs).keys()):
                a, b = (own_attributes(m).get(name) for m in (ours, theirs))
                if not _equal(a, b):
                    where = ".".join(part for part in (path, inner) if part)
                    raise ValueError(
                        f"fuse: branches must have the same settings, got {name}={a!r} at {where!r} "
                        f"({type(ours).__name__}) in branch 0 and {b!r} in branch {k}"
                    )


def captured(function: FunctionType) -> list[Any]:
    """Values that a function made inside another one uses."""
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _equal(a: Any, b: Any) -> bool:  # noqa: PLR0911 (one return a kind)
    if type(a) is not type(b):
        return False
    if a is b:
        return True
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, FunctionType):  # lambdas made per branch: same code and same captured values
        return a.__code__ == b.__code__ and _equal([a.__defaults__, captured(a)], [b.__defaults__, captured(b)])
    if isinstance(a, MethodType):
        return _equal(a.__func__, b.__func__) and type(a.__self__) is type(b.__self__)
    if isinstance(a, partial):
        return _equal([a.func, a.args, a.keywords], [b.func, b.args, b.keywords])
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    by_identity: Any = type(a).__eq__
    if by_identity is object.__eq__ and hasattr(a, "__dict__") and not isinstance(a, nn.Module):
        return _equal(vars(a), vars(b))
    same = a == b
    return bool(same.all() if hasattr(same, "all") else same) or (a != a and b != b)  # noqa: PLR0124 (nan)
