"""Honest tracing: torch.fx records one branch's forward; whatever it would record wrongly is found or refused."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from bsfast.fuse.inplace import remove_inplace
from bsfast.fuse.rules import find_rule
from bsfast.nn import Pointwise, Samplewise

MAY_RETURN_INPUT = (None, Pointwise.from_branches, Samplewise.from_branches)
_SHAPE_METHODS = {"size", "dim", "ndimension", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


class Untraceable(Exception):  # noqa: N818 (not an error: the module runs by vmap)
    """A module whose forward cannot be recorded; ``path`` names it, ``reason`` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason


def trace(branch: nn.Module, *, training: bool, constants: dict[str, Any]) -> tuple[fx.Graph | None, dict[str, str]]:
    """Record one branch's forward.

    Args:
        branch: Branch without data (its tensors on the meta device).
        training: Mode to trace in; the branch's own flags are restored.
        constants: Values of arguments that are not tensors.

    Returns:
        The graph, free of in-place operations, or None if the branch as a whole cannot be traced; and the paths of modules
        to run by vmap, each with the reason.

    Raises:
        ValueError: If the forward does what no trace can hold: control flow on data, random numbers from nothing, a changed
            Python attribute, writing into inputs, ``*args``.
    """
    signature = inspect.signature(branch.forward)
    for name, parameter in signature.parameters.items():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            raise ValueError(f"fuse: forward must have a fixed list of arguments, got *{name}")
    flags = {module: module.training for module in branch.modules()}
    branch.train(training)
    try:
        return _trace_until_it_works(branch, constants)
    finally:
        for module, flag in flags.items():
            module.training = flag


def _trace_until_it_works(branch: nn.Module, constants: dict[str, Any]) -> tuple[fx.Graph | None, dict[str, str]]:
    opaque: dict[str, str] = {}
    while True:
        before, random = _attributes(branch), torch.get_rng_state()
        try:
            graph = _Tracer(opaque).trace(branch, concrete_args=dict(constants))
        except Untraceable as failure:
            opaque[failure.path] = failure.reason
            if not failure.path:
                return None, opaque
            continue
        _refuse_lost_effects(branch, before, random)
        _drop_constants(graph, constants)
        remove_inplace(graph)
        return graph, opaque


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opaque: dict[str, str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.path = ""
        self.contexts: tuple[bool, ...] = _contexts()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return find_rule(m) is not None or module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outer, self.path = self.path, self.path_of_module(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except (Untraceable, ValueError):
            raise
        except Exception as error:  # whatever a proxy cannot do: the module runs by vmap of itself instead
            raise Untraceable(self.path, f"{type(error).__name__}: {error}") from error
        else:
            if self.is_leaf_module(m, self.path):
                result.node.meta["may_alias"] = find_rule(m) in MAY_RETURN_INPUT
            return result
        finally:
            self.path = outer

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        try:
            return super().trace(root, concrete_args)
        except (Untraceable, ValueError):
            raise
        except Exception as error:
            raise Untraceable("", f"{type(error).__name__}: {error}") from error

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise Untraceable(self.path, "it switches gradients or autocast on or off")
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.path
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        module = self.root.get_submodule(self.path)
        if _from_shape(obj.node):
            raise Untraceable(self.path, "its control flow depends on shapes")
        if type(module).__module__.startswith("torch.nn."):
            raise Untraceable(self.path, "its control flow depends on its input")
        raise ValueError(
            f"fuse: control flow must not depend on data, got an if or while on node {obj.node.name!r} in "
            f"{type(module).__name__} {self.path or '(the branch itself)'!r}; use torch.where, or register_rule"
        )


def _contexts() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _from_shape(node: fx.Node) -> bool:
    """Say whether a value depends on tensors only through their shapes, dtypes and devices."""
    if node.op == "call_method" and node.target in _SHAPE_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES:
        return True
    return node.op == "call_function" and all(map(_from_shape, node.all_input_nodes))


def _attributes(branch: nn.Module) -> dict[tuple[str, str], Any]:
    """Plain Python values that the modules hold."""
    plain = (int, float, str, bool, type(None))
    return {
        (path, name): value
        for path, module in branch.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain)
    }


def _refuse_lost_effects(branch: nn.Module, before: dict[tuple[str, str], Any], random: Tensor) -> None:
    """Raise if tracing drew random numbers or changed attributes: every later call would miss it."""
    if not torch.equal(torch.get_rng_state(), random):
        raise ValueError(
            "fuse: forward must draw random numbers in the shape of a tensor it is given (torch.randn_like), got a draw that "
            "depends on no input and would be frozen"
        )
    after = _attributes(branch)
    for path, name in after.keys() | before.keys():
        if after.get((path, name)) != before.get((path, name)):
            raise ValueError(
                f"fuse: forward must not change Python attributes, got a change of {name!r} in {path or 'the branch'!r}; "
                "register a buffer"
            )


def _drop_constants(graph: fx.Graph, constants: dict[str, Any]) -> None:
    """Remove the placeholders that fx makes for constant arguments, with the checks that hang on them."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target not in constants and _base(str(node.target)) in constants:
            for user in list(node.users):
                for check in [*user.users, user]:
                    graph.erase_node(check)
            graph.erase_node(node)


def _base(name: str) -> str:
    return name.rpartition("_")[0]
