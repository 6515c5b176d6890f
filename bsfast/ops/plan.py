"""Shape -> algorithm and the reason for it. Pure functions of sizes, dtypes and devices; nothing is run here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from bsfast.ops.backend import native_why_not

NATIVE_DTYPES = (torch.float32, torch.float64)
LANES = 16  # float32 values in the widest vector


_notes: list["Plan"] | None = None


@contextmanager
def noting() -> Iterator[list["Plan"]]:
    """Collect every choice made in this block, in order; for reports."""
    global _notes  # noqa: PLW0603 (one observer at a time, only reports use it)
    _notes = []
    try:
        yield _notes
    finally:
        _notes = None


def _note(chosen: "Plan") -> "Plan":
    if _notes is not None:
        _notes.append(chosen)
    return chosen


class Plan(NamedTuple):
    """How an operator is computed.

    Attributes:
        algorithm: ``"native"`` (own kernel), ``"loop"`` (stock operator, one call a branch) or ``"grouped"`` (stock
            operator, one grouped call).
        reason: Why, in a sentence fragment.
    """

    algorithm: str
    reason: str


def conv2d(
    *,
    device: str,
    dtype: torch.dtype,
    batch_last: bool,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Plan:
    """Choose the algorithm of ``conv2d`` and, with the same kernel, of its input gradient.

    Args:
        device: Device type of the operands.
        dtype: Their dtype.
        batch_last: Whether the activations have their samples innermost in memory.
        kernel_size: kH, kW.
        stride: As ``torch.nn.Conv2d``.
        dilation: As ``torch.nn.Conv2d``.
        groups: Groups inside a branch.

    Returns:
        Algorithm and reason.
    """
    refusals = (
        (native_why_not(device), True),
        (f"{dtype} has no own kernel", dtype not in NATIVE_DTYPES),
        (f"kernel {kernel_size[0]}x{kernel_size[1]} has no own kernel yet", kernel_size != (3, 3)),
        (f"stride {stride} has no own kernel yet", stride != (1, 1)),
        (f"dilation {dilation} has no own kernel yet", dilation != (1, 1)),
        (f"{groups} groups inside a branch have no own kernel yet", groups != 1),
        ("the activations are not batch-last in memory", not batch_last),
    )
    for why_not, applies in refusals:
        if applies and why_not is not None:
            return _note(stock(device, why_not))
    return _note(Plan("native", "3x3, stride 1, batch-last: samples in the vector lanes"))


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
        (f"{samples} samples do not fill the vector lanes", samples < LANES),
    )
    for why_not, applies in refusals:
        if applies and why_not is not None:
            return _note(Plan("contiguous", why_not))
    return _note(Plan("batch_last", f"{samples} samples fill the vector lanes of the own kernels"))
