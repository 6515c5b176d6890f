"""Honest tracing: torch.fx records one branch's forward; whatever it would record wrongly is found or refused."""

import functools
import inspect
import operator
import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from bsfast.fuse.inplace import Untraceable, remove_inplace
from bsfast.fuse.rules import find_rule, may_return_input
from bsfast.nn.attributes import attributes_of, refuse_changed_attributes
from bsfast.nn.stacked import renew_lists

_OF_SHAPE = {"size", "dim", "ndimension", "numel", "is_floating_point", "is_complex", "element_size", "get_device"}
_OF_SHAPE |= {"shape", "ndim", "dtype", "device", "is_cuda", "itemsize"}
_OF_MEMORY_ORDER = {"as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", torch.as_strided}


def trace(branch: nn.Module, *, training: bool, constants: dict[str, Any]) -> tuple[fx.Graph | None, dict[str, str]]:
    """Record one branch's forward.

    Args:
        branch: Branch without data (its tensors on the meta device).
        training: Mode to trace in; the branch's own flags are restored.
        constants: Values of arguments that are not tensors.

    Returns:
        The graph, free of in-place operations, or None if the branch as a whole cannot be traced; and the paths of
        modules to run by vmap, each with the reason.

    Raises:
        ValueError: If the forward does what no trace can hold: control flow on data, random numbers from nothing, a
            changed Python attribute, writing into inputs.
    """
    flags = {module: module.training for module in branch.modules()}
    branch.train(training)
    opaque: dict[str, str] = {}
    try:
        while True:
            try:
                return _trace(branch, constants, opaque), opaque
            except Untraceable as failure:
                if failure.path in opaque:  # run by vmap, it still cannot be called
                    raise ValueError(f"fuse: {failure.path!r} cannot be traced: {failure.reason}") from failure
                opaque[failure.path] = failure.reason
                if not failure.path:
                    return None, opaque
    finally:
        for module, flag in flags.items():
            module.training = flag


def _trace(branch: nn.Module, constants: dict[str, Any], opaque: dict[str, str]) -> fx.Graph:
    before, generator, states = attributes_of(branch), torch.get_rng_state(), _random_states()
    buffers = {path: dict(module._buffers) for path, module in branch.named_modules()}
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            graph = _Tracer(constants, opaque).trace(branch)
        if _random_states() != states:
            raise ValueError(
                "fuse: forward must draw random numbers in the shape of a tensor it is given (torch.randn_like), got a "
                "draw that depends on no input and would be frozen"
            )
    finally:
        torch.set_rng_state(generator)
        refuse_changed_attributes(before, attributes_of(branch))
        renew_lists(branch)
        _refuse_assigned_buffers(branch, buffers)
    remove_inplace(graph)
    return graph


def _refuse_assigned_buffers(branch: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    """Put back the buffers; a module that assigned one runs by vmap, which keeps what it assigns."""
    assigned = ""
    for path, module in branch.named_modules():
        for name, tensor in before[path].items():
            if module._buffers.get(name) is not tensor:
                module._buffers[name] = tensor
                assigned = f"{path}.{name}"
    if assigned:
        path, _, name = assigned.rpartition(".")
        raise Untraceable(path, f"it assigns the buffer {name!r}")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, constants: dict[str, Any], opaque: dict[str, str]) -> None:
        super().__init__()
        self.constants = constants
        self.opaque = opaque
        self.path = ""
        self.contexts = _contexts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, _is_module: bool, _concrete_args: Any = None) -> tuple[Any, list[Any]]:
        positional, named = [], {}
        for name, parameter in inspect.signature(self.root.forward).parameters.items():
            constant = name in self.constants
            value = self.constants[name] if constant else self.create_proxy("placeholder", name, (), {})
            if parameter.kind == parameter.KEYWORD_ONLY:
                named[name] = value
            else:
                positional.append(value)
        return functools.partial(root_fn, self.root, **named), positional

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return find_rule(m) is not None or module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            path = self.path_of_module(m)
        except NameError as error:
            raise ValueError(
                f"fuse: forward must call registered modules only, got a {type(m).__name__} that is not"
            ) from error
        is_leaf = self.is_leaf_module(m, path)
        outer, self.path = self.path, self.path if is_leaf else path
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            raise _as_untraceable(error, path) from error
        else:
            if is_leaf:
                result.node.meta["may_alias"] = may_return_input(m)
                result.node.meta["inplace"] = bool(getattr(m, "inplace", False))
            return result
        finally:
            self.path = outer

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        try:
            return super().trace(root, concrete_args)
        except Exception as error:
            raise _as_untraceable(error, "") from error

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise Untraceable(self.path, "it switches gradients or autocast on or off")
        if kind.startswith("call_") and target in _OF_MEMORY_ORDER:
            raise Untraceable(self.path, "it depends on the order of its input in memory")
        node = super().create_node(kind, target, *args, **kwargs)
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


def _as_untraceable(error: Exception, path: str) -> Exception:
    """Whatever a proxy cannot do: the module runs by vmap of itself instead; what we refuse stays refused."""
    if isinstance(error, Untraceable) or str(error).startswith("fuse: "):
        return error
    return Untraceable(path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


class _Honest:
    """Forward code that uses ``isinstance`` or dictionaries on a proxy would be misled: the module runs by vmap."""

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asker = sys._getframe(1).f_code  # torch asks too, in Python and, from any frame, in C++
        if asker.co_name == "is_tensor" or ("isinstance" in asker.co_names and not _is_torch(sys._getframe(1))):
            raise Untraceable(self.tracer.path, "it asks for the type of a value")
        return type(self)

    def __hash__(self) -> int:
        if not _is_torch(sys._getframe(1)):
            raise Untraceable(self.tracer.path, "it uses a value as a dictionary key")
        return id(self)


def _is_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).split(".")[0] in {"torch", "bsfast"}


def _in_place(name: str) -> Callable[..., fx.Proxy]:
    """``x += y`` as an in-place operation: torch.fx would record ``x = x + y``, which other names of x do not see."""
    write, new = getattr(operator, f"i{name}"), getattr(operator, f"{name}_" if name in {"and", "or"} else name)

    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        target = new if _from_shape(self.node) else write  # sizes are immutable
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Honest, f"__i{_name}__", _in_place(_name))


class _Proxy(_Honest, fx.Proxy):
    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)


class _Attribute(_Honest, fx.proxy.Attribute):
    pass


def _contexts() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _random_states() -> list[Any]:
    """States of the global generators of torch, Python and, if it is loaded, NumPy; comparable."""
    states: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    if "numpy" in sys.modules:
        states += [
            part.tolist() if hasattr(part, "tolist") else part for part in sys.modules["numpy"].random.get_state()
        ]
    return states


def _from_shape(node: fx.Node) -> bool:
    """Say whether a value depends on tensors only through their shapes, dtypes and devices."""
    target: Any = node.target
    name = node.args[1] if target is getattr else getattr(target, "__name__", target)
    if node.op in {"call_method", "call_function"} and name in _OF_SHAPE:
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_from_shape, node.all_input_nodes))
