"""The table behind ``net.report()``: which kernel runs each node, and why."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from bsfast.fuse import joined
from bsfast.fuse.chains import Chain
from bsfast.fuse.functions import FUNCTIONS
from bsfast.fuse.program import Program, layer_at, rewrite_applies, run_step
from bsfast.fuse.steps import Step
from bsfast.fuse.values import PerBranch
from bsfast.nn.stacked import StackedModule, replaced
from bsfast.nn.vmapped import Vmapped, runs_as
from bsfast.ops import plan

WHOLE = "(the whole branch)"


class Spec:
    """A tensor's shape, strides, dtype and device, and whether it has a branch axis."""

    def __init__(self, tensor: torch.Tensor, per_branch: bool) -> None:
        self.arguments = (tuple(tensor.shape), tensor.stride())
        self.options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
        self.per_branch = per_branch

    @staticmethod
    def of(value: Any) -> Any:
        """Describe a tensor; leave anything else."""
        if isinstance(value, PerBranch):
            return Spec(value.tensor, per_branch=True)
        return Spec(value, per_branch=False) if isinstance(value, torch.Tensor) else value

    @staticmethod
    def make(value: Any) -> Any:
        """Allocate a described tensor; leave anything else."""
        if not isinstance(value, Spec):
            return value
        tensor = torch.empty_strided(*value.arguments, **value.options)
        return PerBranch(tensor) if value.per_branch else tensor


class Row(NamedTuple):
    """One node.

    Attributes:
        node: Path of the module, or name of the node in forward code.
        operation: Class, function or method.
        kernel: ``native``, ``loop``, ``grouped`` (stock, see :mod:`bsfast.ops.plan`), ``aten`` or ``vmap``.
        reason: Why.
    """

    node: str
    operation: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Rows of the table, in the order of computation."""

    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        table = [Row("node", "operation", "kernel", "reason"), *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in table
        )


def describe(net: StackedModule, program: Program, inputs: dict[str, Any] | None) -> Report:
    """Make the table of a program.

    Args:
        net: The fused network.
        program: The program it runs.
        inputs: Arguments by name, tensors without data; None if unknown.

    Returns:
        The report.
    """
    if not program.steps:
        row = Row(WHOLE, type(net.settings).__name__, runs_as(net.settings), program.why_vmap[""])
        return Report([row])
    steps, chosen = _choices(net, program, inputs) if inputs is not None else (program.rewritten(net), None)
    make = {"rewrite": _rewrite_row}
    return Report([make.get(step.op, _row)(step, net, program, chosen) for step in steps if step.op in _SHOWN])


_UNKNOWN = "depends on the input: call the network, or report(x)"
_SHOWN = {"placeholder", "call_module", "call_function", "call_method", "rewrite"}


def _row(step: Step, net: StackedModule, program: Program, chosen: dict[str, plan.Plan] | None) -> Row:
    name = (step.target or WHOLE) if step.op == "call_module" else step.name
    node = f"{step.scope}: {name}" if step.scope and step.op != "call_module" else name
    if step.op == "call_module":
        module = layer_at(net, step.target)
        if isinstance(module, Vmapped):
            return Row(node, type(module.settings).__name__, runs_as(module.settings), program.why_vmap[step.target])
        operation = type(module).__name__
    else:
        operation = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", str(step.target))
    if chosen is not None and step.name in chosen:
        return Row(node, operation, *chosen[step.name][:2])
    if step.op == "placeholder" and chosen is not None:
        return Row(node, operation, "contiguous", "no images: the order in memory is kept")
    if step.op == "placeholder" or operation in {"Conv2d", "conv2d"}:
        return Row(node, operation, "?", _UNKNOWN)
    if step.op != "call_module" and step.target not in FUNCTIONS:
        return Row(node, operation, "vmap", "no rule for this function")
    return Row(node, operation, "aten", "stock operator on all branches at once")


def _rewrite_row(step: Step, net: StackedModule, program: Program, chosen: dict[str, plan.Plan] | None) -> Row:
    parts = [_row(part, net, program, None) for part in step.target.parts]
    node, operation = (" + ".join(row[column] for row in parts) for column in (0, 1))
    if chosen is None:
        return Row(node, operation, "?", _UNKNOWN)
    kernel, reason = chosen[step.name][:2]
    return Row(node, operation, kernel, f"{step.target.reason}; {reason}")


def _choices(net: StackedModule, program: Program, inputs: dict[str, Any]) -> tuple[list[Step], dict[str, plan.Plan]]:
    """Replay the program on tensors without data, the network's too, and note what ran and what each node chose."""
    steps: list[Step] = []
    chosen: dict[str, plan.Plan] = {}
    values: dict[str, Any] = {}
    with FakeTensorMode() as mode, torch.no_grad(), plan.noting() as notes, replaced(net, mode.from_tensor):
        arguments = {name: pytree.tree_map(Spec.make, value) for name, value in inputs.items()}
        for step in program.rewritten(net)[:-1]:
            whole = step.op != "rewrite" or rewrite_applies(step, net, values)
            for part in (step,) if whole else step.target.parts:
                steps.append(part)
                values[part.name] = run_step(part, net, values, arguments, net.num_branches)
                if notes:
                    chosen[part.name] = notes[-1]
                    notes.clear()
        for step in program.schedule(net):
            if step.op == "chain":
                x, residual = (None if ref is None else values[ref.name] for ref in step.args)
                if joined.why_apart(step.target, net, x, residual) is None:
                    chosen |= _joined(step.target, chosen)
    return steps, chosen


def _joined(chain: Chain, chosen: dict[str, plan.Plan]) -> dict[str, plan.Plan]:
    """What the steps of a chain run as, given what each would run as alone."""
    names = [part.target if part.op == "call_module" else part.name for part in chain.parts]
    how = "describes its result" if len(names) == 1 else f"one kernel for {', '.join(names)}"
    if chain.conv is not None and not chain.describes:
        how += ", where no gradients are recorded"
    reasons = {part.name: how for part in chain.parts}
    reasons |= {part.name: f"{chosen[part.name].reason}; {how}" for part in chain.parts if part.target == chain.conv}
    return {name: plan.Plan("native", reason) for name, reason in reasons.items()}
