"""Honest tracing: torch.fx records one branch's forward; what it would record wrongly is looked for, and refused.

Looked for: control flow, type and attribute questions, and conversions of values (:mod:`bsfast.fuse.proxy`); identity
and gradient-mode questions in bytecode (:mod:`bsfast.fuse.questions`); changes of Python attributes, of registered
tensors and of the global random generators of the CPU; constants that are others when the same branch is traced again.

Not seen: state outside the module (a global, a closure, a class attribute) that changes nothing in two successive
traces; writes into a plain tensor through its ``.data`` or NumPy's view of it; ``is`` between values; ``type(x)`` of
more than a local variable, or in functions of another package; decisions on the text of an f-string; what ``except``
would do where an operation fails on tensors, not while tracing (fused, it fails).
"""

import functools
import inspect
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from bsfast.fuse import compare
from bsfast.fuse.inplace import Untraceable, remove_inplace
from bsfast.fuse.proxy import Proxy, from_shape
from bsfast.fuse.questions import question_in
from bsfast.fuse.rules import find_rule, may_return_input
from bsfast.nn.attributes import attributes_of, refuse_changed_attributes, version_of
from bsfast.nn.stacked import renew_lists

_OF_MEMORY_ORDER = {"as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", torch.as_strided}


def trace(
    branch: nn.Module, *, training: bool, constants: dict[str, Any], twice: bool = True
) -> tuple[fx.Graph | None, dict[str, str]]:
    """Record one branch's forward.

    Args:
        branch: Branch without data (its tensors on the meta device).
        training: Mode to trace in; the branch's own flags are restored.
        constants: Values of arguments that are not tensors.
        twice: Whether to record a second time and compare; one of M branches is enough.

    Returns:
        The graph, free of in-place operations, or None if the branch as a whole cannot be traced; and the paths of
        modules to run by vmap, each with the reason.

    Raises:
        ValueError: If the forward does what no trace can hold: control flow on data, random numbers from nothing, a
            changed Python attribute, writing into inputs, a constant that moves; or if ``__call__`` is overridden.
    """
    if type(branch).__call__ is not nn.Module.__call__:
        raise ValueError(
            f"fuse: branches must be called by torch.nn.Module.__call__, got {type(branch).__name__}.__call__; "
            "override forward instead"
        )
    flags = {module: module.training for module in branch.modules()}
    branch.train(training)
    opaque: dict[str, str] = {}
    try:
        while True:
            try:
                return _trace(branch, constants, opaque, twice), opaque
            except Untraceable as failure:
                path = failure.path
                while path and path in opaque:  # run by vmap, it still cannot be called: its parent does that
                    path = path.rpartition(".")[0]
                if not path:
                    return None, {"": failure.reason}
                inside = [other for other in opaque if other.startswith(f"{path}.")]
                opaque = {other: why for other, why in opaque.items() if other not in inside} | {path: failure.reason}
    finally:
        for module, flag in flags.items():
            module.training = flag


def _trace(branch: nn.Module, constants: dict[str, Any], opaque: dict[str, str], twice: bool) -> fx.Graph:
    graph, made = _record(branch, constants, opaque)
    if twice:
        again, made_again = _record(branch, constants, opaque)
        try:
            compare.check_graphs([graph, again])
            for (name, a), b in zip(made.items(), made_again.values(), strict=True):
                if not a.is_meta and not torch.equal(a, b) and repr(a.tolist()) != repr(b.tolist()):  # nan equals nan
                    raise ValueError(f"got {name}={a.tolist()} in branch 0 and {b.tolist()} in branch 1")
        except ValueError as error:
            got = str(error).partition("got ")[2].replace("in branch 0", "first").replace("in branch 1", "then")
            raise ValueError(f"fuse: forward must compute the same each time, got {got}; register a buffer") from error
        graph = again
    remove_inplace(graph)
    return graph


def _record(branch: nn.Module, constants: dict[str, Any], opaque: dict[str, str]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Return the graph, and the tensors that forward code made, which torch.fx keeps in the branch."""
    for name in _made_in_trace(branch):
        delattr(branch, name)
    before, registered = attributes_of(branch), _registered(branch)
    generator, states = torch.get_rng_state(), _random_states()
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
        changes = _restore(registered, _registered(branch))
        refuse_changed_attributes(before, attributes_of(branch))
        renew_lists(branch)
        if changes:
            raise changes[0]
    return graph, _made_in_trace(branch)


def _made_in_trace(branch: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(branch).items() if name.startswith("_tensor_constant")}


class _Registered(NamedTuple):
    path: str
    kind: str
    home: dict[str, Any]
    tensor: Tensor | None
    version: int


def _registered(branch: nn.Module) -> dict[tuple[int, str], _Registered]:
    """Parameters and buffers by dictionary and name, with the writes into each so far."""
    return {
        (id(home), name): _Registered(path, kind, home, tensor, version_of(tensor) if isinstance(tensor, Tensor) else 0)
        for path, module in branch.named_modules()
        for kind, home in (("parameter", module._parameters), ("buffer", module._buffers))
        for name, tensor in home.items()
    }


def _restore(before: dict[tuple[int, str], _Registered], after: dict[tuple[int, str], _Registered]) -> list[Exception]:
    """Put back parameters and buffers, and say what changed; vmap keeps what a module writes and assigns."""
    changes: list[Exception] = []
    for key, now in after.items():
        if key not in before:
            del now.home[key[1]]
            changes.append(
                ValueError(
                    f"fuse: forward must not register tensors, got the {now.kind} {key[1]!r} in "
                    f"{now.path or 'the branch'!r}; register it in __init__"
                )
            )
    for key, was in before.items():
        now_here = after.get(key)
        if now_here is None or now_here.tensor is not was.tensor:
            was.home[key[1]] = was.tensor
            changes.append(Untraceable(was.path, f"it assigns the {was.kind} {key[1]!r}"))
        elif now_here.version != was.version:
            changes.append(Untraceable(was.path, f"it writes into the {was.kind} {key[1]!r}"))
    return changes


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, constants: dict[str, Any], opaque: dict[str, str]) -> None:
        super().__init__()
        self.constants = constants
        self.opaque = opaque
        self.path = ""
        self.contexts = _contexts()
        self.failure: Exception | None = None

    def fail(self, error: Exception) -> Exception:
        """Remember the first refusal, which forward code may catch."""
        self.failure = self.failure or error
        return error

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        graph = fx.Graph()
        try:
            self.refuse_questions(root, "")
            graph = super().trace(root, concrete_args)
        except Exception as error:
            self.fail(_as_untraceable(error, ""))
        if self.failure is not None:
            raise self.failure
        return graph

    def refuse_questions(self, module: nn.Module, path: str) -> None:
        question = question_in(module)
        if question:
            raise self.fail(Untraceable(path, question))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

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
            raise self.fail(
                ValueError(f"fuse: forward must call registered modules only, got a {type(m).__name__} that is not")
            ) from error
        is_leaf = self.is_leaf_module(m, path)
        outer, self.path = self.path, self.path if is_leaf else path
        try:
            if not is_leaf:
                self.refuse_questions(m, path)
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            raise self.fail(_as_untraceable(error, path)) from error
        else:
            if is_leaf:
                result.node.meta["may_alias"] = may_return_input(m)
                result.node.meta["inplace"] = bool(getattr(m, "inplace", False))
            return result
        finally:
            self.path = outer

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise self.fail(Untraceable(self.path, "it switches gradients or autocast on or off"))
        if kind.startswith("call_") and target in _OF_MEMORY_ORDER:
            raise self.fail(Untraceable(self.path, "it depends on the order of its input in memory"))
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["scope"] = self.path
        return node

    def iter(self, _: fx.Proxy) -> Any:
        raise self.fail(Untraceable(self.path, "it iterates over a value"))

    def to_bool(self, obj: fx.Proxy) -> bool:
        module = self.root.get_submodule(self.path)
        if from_shape(obj.node):
            raise self.fail(Untraceable(self.path, "its control flow depends on shapes"))
        if type(module).__module__.startswith("torch.nn."):
            raise self.fail(Untraceable(self.path, "its control flow depends on its input"))
        raise self.fail(
            ValueError(
                f"fuse: control flow must not depend on data, got an if or while on node {obj.node.name!r} in "
                f"{type(module).__name__} {self.path or '(the branch itself)'!r}; use torch.where, or register_rule"
            )
        )


def _as_untraceable(error: Exception, path: str) -> Exception:
    """Whatever a proxy cannot do: the module runs by vmap of itself instead; what we refuse stays refused."""
    if isinstance(error, Untraceable) or str(error).startswith("fuse: "):
        return error
    return Untraceable(path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


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
