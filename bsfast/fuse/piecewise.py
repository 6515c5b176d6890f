"""What a fused network is as a function of one parameter: the proof, from the traced graph, that a shortcut is exact.

From the layer that reads the parameter on, every step must be in a table here. The value of a step outside the tables
may be any function of the parameter, so nothing is claimed then. Samples must stay apart too: axis 0 of what a branch
sees is the sample axis of every value on the way.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from bsfast.fuse.function_rules import as_written, pointwise
from bsfast.fuse.functions import FUNCTIONS
from bsfast.fuse.program import Program, layer_at, run_step
from bsfast.fuse.steps import Ref, Step
from bsfast.fuse.values import PerBranch, dtype_of, leaves_of
from bsfast.nn import BatchNorm, Conv2d, GroupNorm, InstanceNorm2d, LayerNorm, Linear
from bsfast.nn.per_sample import has_per_sample_grads
from bsfast.nn.stacked import StackedModule, replaced


class Tail(NamedTuple):
    """The network as a function of one parameter.

    Attributes:
        layer: Path of the one layer that reads it, None if there is none or more than one.
        per_sample: Whether each sample's output depends on the layer's output of that sample only.
        piecewise_linear: Whether the output is moreover piecewise linear in the parameter.
        reason: Why not, or why.
        rank_one: Whether the layer is linear on one vector a sample, so that the gradients of its weights are outer
            products.
    """

    layer: str | None
    per_sample: bool
    piecewise_linear: bool
    reason: str
    rank_one: bool = False


@dataclass(frozen=True)
class _Operand:
    """A tensor in a step's arguments, as one branch sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tainted: bool  # whether it depends on the parameter

    @property
    def rank(self) -> int:
        return len(self.shape)


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: tuple[int, ...]

    @property
    def operands(self) -> list[_Operand]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, _Operand)]

    @property
    def first_only(self) -> bool:
        """Whether the first argument, and nothing else, depends on the parameter."""
        first = bool(self.args) and isinstance(self.args[0], _Operand) and self.args[0].tainted
        return first and sum(operand.tainted for operand in self.operands) == 1


def tails(net: StackedModule, program: Program, names: Sequence[str], inputs: dict[str, Any]) -> dict[str, Tail]:
    """Say for each parameter what the network is as a function of it.

    Args:
        net: The fused network.
        program: The program it runs.
        names: Names of parameters.
        inputs: Tensors by argument name, per-branch or shared; only shapes, dtypes and devices matter.

    Returns:
        By name.
    """
    if not program.steps:
        return dict.fromkeys(names, Tail(None, False, False, "the branches run by vmap as a whole"))
    readers = {name: [step for step in program.steps if _reads(step, net, net.get_parameter(name))] for name in names}
    batch = next((reason for step in program.steps for reason in _batch_statistics(step, net)), "")
    values = _replay(net, program, inputs)
    return {name: _tail(net, program, readers[name], values, batch) for name in names}


def _reads(step: Step, net: nn.Module, parameter: Tensor) -> bool:
    if step.op == "get_attr":
        path, _, leaf = step.target.rpartition(".")
        return getattr(net.get_submodule(path), leaf) is parameter
    return step.op == "call_module" and any(own is parameter for own in layer_at(net, step.target).parameters())


def _batch_statistics(step: Step, net: nn.Module) -> Iterator[str]:
    if step.op == "call_module":
        for module in layer_at(net, step.target).modules():
            normalises = isinstance(module, (BatchNorm, nn.modules.batchnorm._BatchNorm))
            if normalises and (module.training or module.running_mean is None):
                yield f"batch normalisation at {step.name!r} uses the statistics of the batch"
    elif step.target is F.batch_norm:
        yield f"batch normalisation at {step.name!r} is written as a function"


def _replay(net: StackedModule, program: Program, inputs: dict[str, Any]) -> dict[str, Any]:
    """Values of all steps, without data."""
    values: dict[str, Any] = {}
    with FakeTensorMode() as mode, torch.no_grad(), replaced(net, mode.from_tensor):

        def fake(leaf: Any) -> Any:
            if isinstance(leaf, PerBranch):
                return PerBranch(mode.from_tensor(leaf.tensor))
            return mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf

        arguments = {name: pytree.tree_map(fake, value) for name, value in inputs.items()}
        for step in program.steps[:-1]:
            values[step.name] = run_step(step, net, values, arguments, net.num_branches)
    return values


def _tail(net: nn.Module, program: Program, readers: list[Step], values: dict[str, Any], batch: str) -> Tail:
    if len(readers) != 1:
        return Tail(None, False, False, f"the parameter is used at {len(readers)} places")
    source = readers[0]
    layer = layer_at(net, source.target) if source.op == "call_module" else None
    plain = len(source.args) == 1 and isinstance(source.args[0], Ref) and not source.kwargs
    if layer is None or not has_per_sample_grads(layer) or not plain:
        what = type(layer).__name__ if layer is not None else "forward code"
        return Tail(None, False, False, batch or f"the parameter is used by {what} at {source.name!r}")
    shape = _shape(values[source.name])
    least = 4 if type(layer) is Conv2d else 2
    if len(shape) < least or not isinstance(values[source.name], PerBranch):
        return Tail(None, False, False, f"the input of {source.name!r} has no axis of samples")
    path, rank_one = source.target, type(layer) is Linear and len(shape) == 2
    per_sample, why_not = _follow(net, program, source, values, shape[0])
    if batch or why_not:
        return Tail(path, per_sample, False, batch or why_not, rank_one)
    return Tail(path, True, True, f"from {path or 'the layer'!r} on, every step is piecewise linear", rank_one)


def _follow(net: nn.Module, program: Program, source: Step, values: dict[str, Any], samples: int) -> tuple[bool, str]:
    """Whether samples stay apart after a step, and why the result is not known to be piecewise linear in its value."""
    tainted, why_not = {source.name}, ""
    for step in program.steps[program.steps.index(source) + 1 :]:
        if not tainted.intersection(ref.name for ref in _refs((step.args, step.kwargs))):
            continue
        if step.op == "output":
            whole = isinstance(step.args[0], Ref) and _shape(values[step.args[0].name])[:1] == (samples,)
            return whole, why_not if whole else "the result is not one tensor of samples"
        if not any(isinstance(leaf, (PerBranch, Tensor)) for leaf in leaves_of(values[step.name])):
            continue  # a shape, a size, a dtype
        verdict = _judge(step, net, values, tainted, samples)
        if verdict == "unknown":
            return False, _not_listed(step, net)
        if verdict == "per_sample":
            why_not = why_not or _not_listed(step, net)
        tainted.add(step.name)
    return True, why_not


def _not_listed(step: Step, net: nn.Module) -> str:
    target = layer_at(net, step.target) if step.op == "call_module" else step.target
    name = type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", str(target))
    return f"{name} at {step.name!r} is not known to be piecewise linear here"


def _judge(step: Step, net: nn.Module, values: dict[str, Any], tainted: set[str], samples: int) -> str:
    """``"linear"`` (piecewise), ``"per_sample"`` or ``"unknown"``."""
    value = values[step.name]
    if not isinstance(value, PerBranch) or not value.tensor.is_floating_point():
        return "unknown"

    def operand(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        known = values[leaf.name]
        if not isinstance(known, (PerBranch, Tensor)):
            return known
        return _Operand(_shape(known), dtype_of(known), leaf.name in tainted)

    args, kwargs = pytree.tree_map(operand, (step.args, step.kwargs), is_leaf=lambda leaf: isinstance(leaf, Ref))
    call = _Call(args, kwargs, _shape(value))
    before = [own for own in call.operands if own.tainted]
    if any(own.dtype != value.tensor.dtype for own in before):
        return "unknown"
    if any(shape[:1] != (samples,) for shape in (call.result, *(own.shape for own in before))):
        return "unknown"
    if step.op == "call_module":
        return _judge_layer(layer_at(net, step.target), call)
    linear = _LINEAR.get(step.target)
    if linear is not None and linear(call):
        return "linear"
    alone = FUNCTIONS.get(step.target) is pointwise and not step.is_random and _same_rank(call)
    return "per_sample" if alone else "unknown"


def _judge_layer(layer: nn.Module, call: _Call) -> str:
    if not call.first_only or len(call.args) != 1 or call.kwargs:
        return "unknown"
    rank = call.args[0].rank
    if has_per_sample_grads(layer):
        return "linear" if rank >= (4 if type(layer) is Conv2d else 2) else "unknown"
    if type(layer) is LayerNorm:
        return "per_sample" if rank > len(layer.settings.normalized_shape) else "unknown"  # type: ignore[arg-type]
    return "per_sample" if (type(layer), rank) == (InstanceNorm2d, 4) or type(layer) is GroupNorm else "unknown"


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.tensor.shape[1:]) if isinstance(value, PerBranch) else tuple(getattr(value, "shape", ()))


def _refs(arguments: Any) -> list[Ref]:
    found = []
    for leaf in pytree.tree_leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, Ref)):
        parts = (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)
        found += [part for part in parts if isinstance(part, Ref)]
    return found


def _same_rank(call: _Call) -> bool:
    """Broadcasting leaves the sample axis of what depends on the parameter where it is."""
    return all(own.rank == len(call.result) for own in call.operands if own.tainted)


def _activation(call: _Call) -> bool:
    return call.first_only


def _sum(call: _Call) -> bool:
    return _same_rank(call)


def _product(call: _Call) -> bool:
    return sum(own.tainted for own in call.operands) == 1 and _same_rank(call)


def _quotient(call: _Call) -> bool:
    return call.first_only and call.kwargs.get("rounding_mode") is None and _same_rank(call)


def _pool(axes: int) -> Callable[[_Call], bool]:
    def rule(call: _Call) -> bool:
        return call.first_only and call.args[0].rank == axes + 2 and not call.kwargs.get("return_indices", False)

    return rule


def _resize(call: _Call) -> bool:
    mode = call.args[3] if len(call.args) > 3 else call.kwargs.get("mode", "nearest")
    known = mode in {"nearest", "nearest-exact", "linear", "bilinear", "trilinear"}
    return call.first_only and call.args[0].rank >= 3 and known


def _pad(call: _Call) -> bool:
    widths = call.args[1] if len(call.args) > 1 else call.kwargs.get("pad", ())
    return call.first_only and len(widths) < 2 * call.args[0].rank


def _cat(call: _Call) -> bool:
    dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
    return isinstance(dim, int) and dim % len(call.result) != 0 and _same_rank(call)


def _reshape(call: _Call) -> bool:
    """Row-major order and as many samples before as after: sample n stays sample n."""
    return bool(call.args) and isinstance(call.args[0], _Operand) and call.args[0].tainted


def _mean_of_space(call: _Call) -> bool:
    """Average pooling over the whole image."""
    dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    image = call.first_only and call.args[0].rank == 4
    return image and isinstance(dims, (tuple, list)) and {dim % 4 for dim in dims} == {2, 3}


def _written(call: _Call) -> bool:
    """What stands for an in-place operation: its result, in the dtype of the value that it replaces."""
    return isinstance(call.args[0], _Operand) and call.args[0].tainted


# The whitelist: piecewise linear in what depends on the parameter.
_LINEAR: dict[Any, Callable[[_Call], bool]] = {
    **dict.fromkeys([F.relu, torch.relu, "relu", F.leaky_relu, F.relu6, F.hardtanh, F.prelu, torch.prelu], _activation),
    **dict.fromkeys([F.max_pool1d, F.avg_pool1d, F.adaptive_max_pool1d, F.adaptive_avg_pool1d], _pool(1)),
    **dict.fromkeys([F.max_pool2d, F.avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool2d], _pool(2)),
    **dict.fromkeys([F.max_pool3d, F.avg_pool3d, F.adaptive_max_pool3d, F.adaptive_avg_pool3d], _pool(3)),
    **dict.fromkeys([operator.add, torch.add, "add", operator.sub, torch.sub, "sub"], _sum),
    **dict.fromkeys([operator.mul, torch.mul, "mul", operator.neg, torch.neg, "neg"], _product),
    **dict.fromkeys([operator.truediv, torch.div, "div"], _quotient),
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], _cat),
    **dict.fromkeys([torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.unflatten], _reshape),
    **dict.fromkeys(["view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "contiguous"], _reshape),
    **dict.fromkeys([torch.mean, "mean"], _mean_of_space),
    F.interpolate: _resize,
    F.pad: _pad,
    as_written: _written,
}
