"""A traced graph as a flat list of steps, run on values of M branches."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bsfast.fuse import joined
from bsfast.fuse.advice import advice
from bsfast.fuse.chains import join
from bsfast.fuse.functions import FUNCTIONS, is_random
from bsfast.fuse.inplace import may_alias
from bsfast.fuse.rewrites import rewrite
from bsfast.fuse.steps import Ref, Step, module_at
from bsfast.fuse.values import PerBranch, any_per_branch, expand, vmapped, wrap
from bsfast.nn import BatchNorm
from bsfast.nn.functional import taken_dtype, to_batch_last
from bsfast.nn.vmapped import call_vmapped
from bsfast.ops import plan


def enter(value: Any) -> Any:
    """Bring an input into the memory order that the network runs in: images, maybe batch-last."""
    tensor = value.tensor if isinstance(value, PerBranch) else value
    is_image = isinstance(tensor, Tensor) and tensor.is_floating_point()
    if not is_image or tensor.dim() - isinstance(value, PerBranch) != 4:
        return value
    device = tensor.device.type
    order = plan.memory_order(device=device, dtype=taken_dtype(tensor) if device == "cuda" else tensor.dtype)
    if order.algorithm != "batch_last":
        return value
    return PerBranch(to_batch_last(tensor)) if isinstance(value, PerBranch) else to_batch_last(tensor)


class Method:
    """A call of a tensor's method as a function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method of ``x``."""
        return getattr(x, self.name)(*args, **kwargs)


class Program:
    """What a fused network runs for one mode and one choice of constant arguments.

    Attributes:
        steps: In order; empty if the branches run by vmap as a whole.
        why_vmap: Paths of modules that run by vmap, each with the reason.
        modes: Paths of all modules, each with the mode that it was traced in.
    """

    def __init__(self, graph: fx.Graph | None, why_vmap: dict[str, str], modes: dict[str, bool]) -> None:
        self.steps = tuple(_steps(graph)) if graph is not None else ()
        self.why_vmap = why_vmap
        self.modes = modes
        self._rewritten: tuple[Step, ...] | None = None
        self._schedules: dict[tuple[bool, ...], tuple[Step, ...]] = {}

    def rewritten(self, net: nn.Module) -> tuple[Step, ...]:
        """The steps with pairs that have a cheaper equivalent replaced."""
        if self._rewritten is None:
            self._rewritten = rewrite(self.steps, net)
        return self._rewritten

    def schedule(self, net: nn.Module) -> tuple[Step, ...]:
        """Those with chains joined: what runs. It depends on which normalisations use the batch's statistics."""
        paths = [step.target for step in self.steps if step.op == "call_module" and step.target]
        layers = [module_at(net, path) for path in paths]
        key = tuple(layer.uses_batch for layer in layers if isinstance(layer, BatchNorm))
        if key not in self._schedules:
            self._schedules[key] = join(self.rewritten(net), net)
        return self._schedules[key]

    def same_steps(self, other: "Program") -> bool:
        """Say whether two programs compute the same."""
        return self.steps == other.steps

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        return self  # never changes

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # not pickled: the network traces again when it needs it

    def run(
        self, net: nn.Module, skeleton: nn.Module, inputs: dict[str, Any], constants: dict[str, Any], branches: int
    ) -> Any:
        """Run all steps.

        Args:
            net: Module tree with the stacked parameters.
            skeleton: One branch without data.
            inputs: Tensors by argument name, per-branch or shared.
            constants: The other arguments by name.
            branches: M.

        Returns:
            The branches' result; tensors per-branch, with memory of their own, or shared.
        """
        if not self.steps:
            return _copy(wrap(call_vmapped(net, skeleton, (), constants | expand(inputs, branches))))
        values: dict[str, Any] = {}
        *steps, output = self.schedule(net)
        for step in steps:
            values[step.name] = run_step(step, net, values, inputs, branches)
            for name in step.last_use_of:
                del values[name]
        return resolve(output.args[0], values)


def _steps(graph: fx.Graph) -> Iterator[Step]:
    nodes = list(graph.nodes)
    last_use: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for used in (*node.all_input_nodes, node):
            last_use[used] = node
    seen = {node for node in nodes if node.op in {"placeholder", "get_attr"}}

    def refer(node: fx.Node, other: fx.Node) -> Ref:
        if node.op != "output":
            return Ref(other.name)
        sources = _may_be(other)
        copy = bool(seen & sources)
        seen.update(sources)
        return Ref(other.name, copy)

    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), partial(refer, node))
        done = tuple(used.name for used, user in last_use.items() if user is node)
        random = node.op in {"call_function", "call_method"} and is_random(node.target)
        yield Step(node.op, node.target, args, kwargs, node.name, node.meta.get("scope", ""), done, random)


def _may_be(node: fx.Node) -> set[fx.Node]:
    """Nodes whose memory a node's value may share, itself included."""
    found, queue = {node}, [node]
    while queue:
        member = queue.pop()
        near = [source for source in member.all_input_nodes if may_alias(member) and source not in found]
        queue += near
        found |= set(near)
    return found


def _copy(value: Any) -> Any:
    def one(leaf: Any) -> Any:
        if not isinstance(leaf, PerBranch):
            return leaf
        return PerBranch(torch.clone(leaf.tensor, memory_format=torch.contiguous_format))

    return pytree.tree_map(one, value)


def resolve(argument: Any, values: dict[str, Any]) -> Any:
    """Put values in place of references, in nested arguments."""
    if isinstance(argument, Ref):
        return _copy(values[argument.name]) if argument.copy else values[argument.name]
    if isinstance(argument, tuple):
        entries = [resolve(entry, values) for entry in argument]
        return type(argument)(*entries) if hasattr(argument, "_fields") else tuple(entries)
    if isinstance(argument, list):
        return [resolve(entry, values) for entry in argument]
    if isinstance(argument, dict):
        return {key: resolve(entry, values) for key, entry in argument.items()}
    if isinstance(argument, slice):
        return slice(*(resolve(entry, values) for entry in (argument.start, argument.stop, argument.step)))
    return argument


_EXPLAINED = (ValueError, TypeError, RuntimeError, IndexError, torch.OutOfMemoryError)


def layer_at(net: nn.Module, path: str) -> nn.Module:
    """Return the module that computes a step; if the whole branch is one layer, its path is empty."""
    return module_at(net, path) if path else net._layers[0]  # type: ignore[index,return-value]


def run_step(step: Step, net: nn.Module, values: dict[str, Any], inputs: dict[str, Any], branches: int) -> Any:
    """Compute the value of one step; errors name it.

    Args:
        step: The step.
        net: Module tree with the stacked parameters.
        values: Values of earlier steps by name.
        inputs: Tensors by argument name.
        branches: M.

    Returns:
        The value.

    Raises:
        IndexError: As ``ValueError``.
        OutOfMemoryError: As ``ValueError``.
        RuntimeError: As ``ValueError``.
        TypeError: As ``ValueError``.
        ValueError: If the operation fails.
    """  # noqa: DOC502 (raised as what came)
    if step.op == "placeholder":
        return pytree.tree_map(enter, inputs[step.target])
    if step.op == "rewrite":
        return _run_rewrite(step, net, values, branches)
    if step.op == "get_attr":
        path, _, leaf = step.target.rpartition(".")
        return PerBranch(getattr(net.get_submodule(path), leaf))
    args, kwargs = resolve(step.args, values), resolve(step.kwargs, values)
    if step.op == "chain" and not joined.can_run(step.target, net, *args):
        own = dict(values)
        for part in step.target.parts:
            own[part.name] = run_step(part, net, own, {}, branches)
        return own[step.name]
    if torch.compiler.is_compiling():
        return _call(step, net, args, kwargs, branches)
    try:
        return _call(step, net, args, kwargs, branches)
    except _EXPLAINED as error:
        if type(error) not in _EXPLAINED or str(error).startswith("Branched: "):
            raise
        name = step.target.parts[0].name if step.op == "chain" else step.name
        raise type(error)(f"Branched: at node {name!r}: {error}{advice(error, net, (args, kwargs))}") from error


def rewrite_applies(step: Step, net: nn.Module, values: dict[str, Any]) -> bool:
    """Say whether a rewritten step runs as such on these values, or as its parts."""
    module = module_at(net, step.target.parts[step.target.conv].target)
    return not joined.is_watched(module) and step.target.fits(module, values[step.args[0].name])


def _run_rewrite(step: Step, net: nn.Module, values: dict[str, Any], branches: int) -> Any:
    def run(part: Step, own: dict[str, Any]) -> Any:
        return run_step(part, net, own, {}, branches)

    first, second = step.target.parts
    if not rewrite_applies(step, net, values):
        return run(second, values | {first.name: run(first, values)})
    module = module_at(net, step.target.parts[step.target.conv].target)
    return step.target.compute(module, values[step.args[0].name], run)


def _call(step: Step, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], branches: int) -> Any:
    if step.op == "chain":
        return joined.run(step.target, net, *args)
    if step.op == "call_module":
        module = layer_at(net, step.target)
        if getattr(module, "takes_shared", False) and not any_per_branch((args, kwargs)):
            return wrap(module(*args, **kwargs, shared=True))
        return wrap(module(*expand(args, branches), **expand(kwargs, branches)))
    if not args and "input" in kwargs and "condition" not in kwargs:
        args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
    function: Any = Method(step.target) if step.op == "call_method" else step.target
    if any_per_branch((args, kwargs)):
        rule: Any = FUNCTIONS.get(step.target, vmapped)
        return rule(function, args, kwargs, branches)
    if step.is_random:  # each branch draws its own, on its own copy
        args, kwargs = wrap(expand((args, kwargs), branches))
        return vmapped(function, args, kwargs, branches)
    return function(*args, **kwargs)
