"""Shape -> algorithm and the reason for it. Pure functions of sizes, dtypes and devices; nothing is run here."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from bsfast.ops.backend import native_why_not

NATIVE_DTYPES = (torch.float32, torch.float64)
LANES = 16  # float32 values in the widest vector
FEWEST_SAMPLES = 4  # of which the own kernel computes per-sample gradients faster than stock operators

_NOTES: ContextVar[list["Plan"] | None] = ContextVar("notes", default=None)


@contextmanager
def noting() -> Iterator[list["Plan"]]:
    """Collect every choice made in this block, in order; for reports."""
    notes: list[Plan] = []
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def _note(chosen: "Plan") -> "Plan":
    # dynamo cannot trace context variables, and nobody notes a compiled call.
    notes = None if torch.compiler.is_compiling() else _NOTES.get()
    if notes is not None:
        notes.append(chosen)
    return chosen


class Plan(NamedTuple):
    """How an operator is computed.

    Attributes:
        algorithm: ``"native"`` (own kernel), or how stock operators do it: ``"loop"`` (one call a branch),
            ``"grouped"`` (one grouped call), or a name that the function which chose it explains.
        reason: Why, in a sentence fragment.
    """

    algorithm: str
    reason: str


class Conv2d(NamedTuple):
    """What the choice for a convolution or one of its gradients depends on.

    Attributes:
        device: Device type of the operands.
        dtype: Their dtype.
        batch_last: Whether the activation that is read first has its samples innermost in memory.
        kernel_size: kH, kW.
        stride: As ``torch.nn.Conv2d``.
        padding: Zeros on each side.
        dilation: As ``torch.nn.Conv2d``.
        groups: Groups inside a branch.
        shared: Whether all branches have one input.
    """

    device: str
    dtype: torch.dtype
    batch_last: bool
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    shared: bool


def conv2d(problem: Conv2d) -> Plan:
    """Choose the algorithm of a convolution."""
    return _first_refusal(problem, ())


def conv2d_input_grad(problem: Conv2d) -> Plan:
    """Choose the algorithm of the input gradient."""
    inner = "groups inside a branch have no own kernel for the gradient of a shared input"
    return _first_refusal(problem, ((inner, problem.shared and problem.groups != 1),))


def conv2d_weight_grad(problem: Conv2d) -> Plan:
    """Choose the algorithm of the weight gradient."""
    return _first_refusal(problem, ())


def conv2d_weight_grad_per_sample(*, device: str, dtype: torch.dtype, samples: int) -> Plan:
    """Choose the algorithm of the per-sample weight gradient.

    Args:
        device: Device type of the operands.
        dtype: Their dtype.
        samples: N.

    Returns:
        Algorithm ``"native"`` or ``"unfold"`` (patches of the input, then one product a sample), and the reason.
    """
    refusals = (
        (native_why_not(device), True),
        (f"{dtype} has no own kernel", dtype not in NATIVE_DTYPES),
        (f"fewer than {FEWEST_SAMPLES} samples leave most vector lanes empty", samples < FEWEST_SAMPLES),
    )
    for why_not, applies in refusals:
        if applies and why_not is not None:
            return _note(Plan("unfold", why_not))
    return _note(Plan("native", "every vector lane is a sample: nothing is added up between lanes"))


def _first_refusal(problem: Conv2d, refusals: tuple[tuple[str, bool], ...]) -> Plan:
    device, dtype = problem.device, problem.dtype
    all_refusals = (
        (native_why_not(device), True),
        (f"{dtype} has no own kernel", dtype not in NATIVE_DTYPES),
        *refusals,
        ("the activations are not batch-last in memory", not problem.batch_last),
    )
    for why_not, applies in all_refusals:
        if applies and why_not is not None:
            return _note(stock(device, why_not))
    return _note(Plan("native", "batch-last: samples in the vector lanes"))


def batch_norm(*, device: str, dtype: torch.dtype, memory: str, has_kernel: bool) -> Plan:
    """Choose the algorithm of batch normalisation with the statistics of the batch.

    Args:
        device: Device type of the operands.
        dtype: Their dtype.
        memory: Memory order that they share, or what is in its way.
        has_kernel: Whether the kernel knows that order.

    Returns:
        Algorithm ``"native"`` or ``"aten"``, and the reason.
    """
    refusals = (
        (native_why_not(device), True),
        (f"{dtype} has no own kernel", dtype not in NATIVE_DTYPES),
        (f"{memory} has no own kernel", not has_kernel),
    )
    for why_not, applies in refusals:
        if applies and why_not is not None:
            return _note(Plan("aten", why_not))
    return _note(Plan("native", f"{memory}: a channel is normalised while it is in cache"))


def sample_norm(*, device: str, dtype: torch.dtype, memory: str, has_kernel: bool) -> Plan:
    """Choose the algorithm of normalisation with the statistics of each sample; arguments as :func:`batch_norm`."""
    refusals = (
        (native_why_not(device), True),
        (f"{dtype} has no own kernel", dtype not in NATIVE_DTYPES),
        (f"{memory} has no own kernel", not has_kernel),
    )
    for why_not, applies in refusals:
        if applies and why_not is not None:
            return _note(Plan("aten", why_not))
    return _note(Plan("native", f"{memory}: a group of channels is normalised while it is in cache"))


def stock(device: str, why_not_native: str) -> Plan:
    """Choose between the stock algorithms: oneDNN is faster branch by branch, cuDNN wants one launch."""
    return Plan("loop" if device == "cpu" else "grouped", why_not_native)


def memory_order(*, device: str, dtype: torch.dtype, samples: int) -> Plan:
    """Choose the memory order of a network's activations, once, at its entry.

    Args:
        device: Device type of the input.
        dtype: Its dtype.
        samples: N.

    Returns:
        Algorithm ``"batch_last"`` or ``"contiguous"``, and the reason.
    """
    refusals = (
        (native_why_not(device), True),
        (f"{dtype} has no own kernel", dtype not in NATIVE_DTYPES),
        (f"fewer than {LANES} samples do not fill the vector lanes", samples < LANES),
    )
    for why_not, applies in refusals:
        if applies and why_not is not None:
            return _note(Plan("contiguous", why_not))
    return _note(Plan("batch_last", f"{LANES} or more samples fill the vector lanes of the own kernels"))
