"""Shape -> algorithm and the reason for it. Pure functions of sizes, dtypes and devices; nothing is run here."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch

from bsfast.ops.backend import kernel_why_not
from bsfast.ops.cuda import gpu_generation

LANES = 16  # float32 values in the widest vector
MANY_SAMPLES = 64
FEWEST_SAMPLES = 4  # of which the own kernel computes per-sample gradients faster than stock operators

# Winograd's time on two cores with AVX-512 (tests/benchmarks/records): tile -> (its gain over direct multiply-adds with
# many channels, the channels with which it gains half of that). A gradient of the weights adds up what it transforms.
_GAIN = {2: (2.1, 5.0), 4: (3.4, 12.0)}
_WEIGHT_GRAD_GAIN = {2: (1.75, 7.0), 4: (2.8, 14.0)}
_LEAST_GAIN = 1.05
_KEPT = 4096  # plans, of which a network of few samples needs each as often as it runs

# Time of weight gradients of few samples, in multiply-adds of a vector, fitted to 3x3 and 1x1 layers of 3 to 32
# channels and 4 to 32 columns at N = 1 to 32 (AVX-512, one thread): a direct tile beside those of its line,
# transposing an element of the input, a multiply-add with a patch.
_TILE_COST = 3.0
_TRANSPOSE_COST = 1.5
_PATCH_COST = 1.1
_largest_tile = 2

# GPUs by generation, and dtypes that convolutions compute in, for which stock operators train the networks of
# tests/benchmarks/records/gpu-*.json (`make gpu-bench`) faster than own kernels, and how many times. Empty as long as
# no GPU has been measured: own kernels run wherever they can.
_STOCK_FASTER: dict[tuple[str, torch.dtype], float] = {}

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


def is_noting() -> bool:
    """Whether a block collects choices."""
    return _notes() is not None


def _notes() -> list["Plan"] | None:
    # dynamo cannot trace context variables, and nobody notes a compiled call.
    return None if torch.compiler.is_compiling() else _NOTES.get()


def _note(chosen: "Plan") -> "Plan":
    notes = _notes()
    if notes is not None:
        notes.append(chosen)
    return chosen


def set_winograd_tile(tile: int) -> None:
    """Set the largest tile of outputs by which Winograd's minimal filtering may compute convolutions in this process.

    A 3x3 convolution of stride 1 by tiles of 2x2 outputs takes 2.25 times fewer multiplications than a direct one, by
    tiles of 4x4 outputs 4 times fewer; errors relative to float64 grow from about 2e-7 to 4e-7 and 2e-6.

    Args:
        tile: 2 (at first), 4, or 0 for direct convolutions only.

    Raises:
        ValueError: If it is anything else.
    """
    if type(tile) is not int or tile not in (0, *_GAIN):
        raise ValueError(f"set_winograd_tile: tile must be 0, 2 or 4, got {tile!r}")
    global _largest_tile  # noqa: PLW0603
    _largest_tile = tile


class Plan(NamedTuple):
    """How an operator is computed.

    Attributes:
        algorithm: ``"native"`` (own kernel), or how stock operators do it: ``"loop"`` (one call a branch),
            ``"grouped"`` (one grouped call), or a name that the function which chose it explains.
        reason: Why, in a sentence fragment.
        tile: Outputs along each axis of Winograd's tiles, or 0 where a convolution is computed directly.
        patches: Whether a weight gradient has patches of the input in the vector lanes.
    """

    algorithm: str
    reason: str
    tile: int = 0
    patches: bool = False


class Conv2d(NamedTuple):
    """What the choice for a convolution or one of its gradients depends on.

    Attributes:
        device: Device type of the operands.
        dtype: Their dtype.
        batch_last: Whether the activation that is read first has its samples innermost in memory; of one sample, which
            contiguous memory is.
        samples: N.
        kernel_size: kH, kW.
        stride: As ``torch.nn.Conv2d``.
        padding: Zeros on each side.
        dilation: As ``torch.nn.Conv2d``.
        groups: Groups inside a branch.
        shared: Whether all branches have one input.
        channels: C_in and C_out of a group.
        size: Height and width of the input.
    """

    device: str
    dtype: torch.dtype
    batch_last: bool
    samples: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    shared: bool
    channels: tuple[int, int]
    size: tuple[int, int]


def conv2d(problem: Conv2d) -> Plan:
    """Choose the algorithm of a convolution."""
    return _note(_conv2d(problem, _largest_tile, kernel_why_not("conv2d", problem.device, problem.dtype)))


def conv2d_input_grad(problem: Conv2d) -> Plan:
    """Choose the algorithm of the input gradient."""
    return _note(_conv2d_input_grad(problem, _largest_tile, kernel_why_not("conv2d", problem.device, problem.dtype)))


def conv2d_weight_grad(problem: Conv2d) -> Plan:
    """Choose the algorithm of the weight gradient."""
    return _note(_conv2d_weight_grad(problem, _largest_tile, kernel_why_not("conv2d", problem.device, problem.dtype)))


@lru_cache(maxsize=_KEPT)
def _conv2d(problem: Conv2d, largest_tile: int, no_kernel: str | None) -> Plan:
    _, tile = _winograd(problem, _GAIN, problem.padding, largest_tile)
    return _choose(problem, no_kernel, tile=tile)


@lru_cache(maxsize=_KEPT)
def _conv2d_input_grad(problem: Conv2d, largest_tile: int, no_kernel: str | None) -> Plan:
    inner = "groups inside a branch have no own kernel for the gradient of a shared input"
    transposed = (2 - problem.padding[0], 2 - problem.padding[1])  # padding of the gradient, which is the source
    _, tile = _winograd(problem, _GAIN, transposed, largest_tile)
    return _choose(problem, no_kernel or (inner if problem.shared and problem.groups != 1 else None), tile=tile)


@lru_cache(maxsize=_KEPT)
def _conv2d_weight_grad(problem: Conv2d, largest_tile: int, no_kernel: str | None) -> Plan:
    gain, tile = _winograd(problem, _WEIGHT_GRAD_GAIN, problem.padding, largest_tile, skips=False)
    # oneDNN adds up the gradients of many samples faster branch by branch; all else it does faster at once.
    stock = "loop" if problem.device == "cpu" and problem.samples >= MANY_SAMPLES else "grouped"
    patches = _patch_gain(problem) > gain
    return _choose(problem, no_kernel, tile=0 if patches else tile, patches=patches, stock=stock)


def conv2d_weight_grad_per_sample(*, device: str, dtype: torch.dtype, samples: int) -> Plan:
    """Choose the algorithm of the per-sample weight gradient.

    Args:
        device: Device type of the operands.
        dtype: Their dtype.
        samples: N.

    Returns:
        Algorithm ``"native"`` or ``"unfold"`` (patches of the input, then one product a sample), and the reason.
    """
    if why_not := kernel_why_not("sample_grad", device, dtype):
        return _note(Plan("unfold", why_not))
    if device == "cuda":
        return _note(Plan("native", "a thread is a sample: nothing is added up between threads"))
    if samples < FEWEST_SAMPLES:
        return _note(Plan("unfold", f"fewer than {FEWEST_SAMPLES} samples leave most vector lanes empty"))
    return _note(Plan("native", "every vector lane is a sample: nothing is added up between lanes"))


def _choose(
    problem: Conv2d, no_kernel: str | None, *, tile: int, patches: bool = False, stock: str = "grouped"
) -> Plan:
    if no_kernel is None and not problem.batch_last:
        no_kernel = "the activations are not batch-last in memory"
    if no_kernel is not None:
        return Plan(stock, no_kernel)
    if problem.device == "cuda":
        return Plan("native", "batch-last: samples and positions in the lanes of a warp")
    many = "samples" if problem.samples >= LANES else "columns and samples"
    lanes = "column taps and channels" if patches else many
    how = f"; Winograd by {tile}x{tile} outputs" if tile else ""
    return Plan("native", f"batch-last: {lanes} in the vector lanes{how}", tile, patches)


def _winograd(
    problem: Conv2d,
    gains: dict[int, tuple[float, float]],
    padding: tuple[int, int],
    largest_tile: int,
    *,
    skips: bool = True,
) -> tuple[float, int]:
    """Estimate what the fastest tile gains over direct multiply-adds.

    Args:
        problem: The convolution.
        gains: Of each tile.
        padding: Of the source.
        largest_tile: That may be used.
        skips: Whether the direct kernel skips taps on padding.

    Returns:
        The gain, and outputs of the tile along each axis; the least gain and 0 where none is faster.
    """
    estimates = [(_LEAST_GAIN, 0)]
    three = problem.kernel_size == (3, 3) and problem.stride == problem.dilation == (1, 1)
    if not three or min(padding) < 0 or max(padding) > 2 or problem.dtype != torch.float32:
        return estimates[0]
    if 0 in (problem.samples, *problem.size, *problem.channels):
        return estimates[0]
    for tile, (most, half_at) in gains.items():
        gain = most / (1 + half_at * sum(1 / channels for channels in problem.channels) / 2)
        gain *= problem.samples / (LANES * ceil(problem.samples / LANES))
        for size, own, of_source in zip(problem.size, problem.padding, padding, strict=True):
            target = size + (2 * own - 2 if own == of_source else 0)
            skipped = of_source * (of_source + 1) / (3 * target) if skips else 0  # share of taps
            gain *= (1 - skipped) * target / (tile * ceil(target / tile))
        estimates += [(gain, tile)] if tile <= largest_tile else []
    return max(estimates)


def _patch_gain(problem: Conv2d) -> float:
    """Estimate what patches in the vector lanes gain over samples and columns there, in a direct weight gradient."""
    (inputs, outputs), (height, width), stride = problem.channels, problem.kernel_size, problem.stride[1]
    columns = (problem.size[1] + 2 * problem.padding[1] - width) // stride + 1
    if problem.dilation[1] != 1 or columns < 1 or 0 in (problem.samples, *problem.channels):
        return 0.0
    lanes = LANES * 4 // problem.dtype.itemsize
    pixels, patch = columns * problem.samples, width * inputs
    line = patch * (ceil(pixels / lanes) + _TILE_COST)
    transposed = inputs * columns * stride * problem.stride[0] * problem.samples / (outputs * height)
    return line / (_PATCH_COST * pixels * ceil(patch / lanes) + _TRANSPOSE_COST * transposed)


def norm(*, device: str, dtype: torch.dtype, memory: str, has_kernel: bool, piece: str) -> Plan:
    """Choose the algorithm of a normalisation with statistics of the batch or of each sample.

    Args:
        device: Device type of the operands.
        dtype: Their dtype.
        memory: Memory order that they share, or what is in its way.
        has_kernel: Whether the kernel knows that order.
        piece: What is normalised at a time.

    Returns:
        Algorithm ``"native"`` or ``"aten"``, and the reason.
    """
    refusals = (
        (kernel_why_not("norm", device, dtype), True),
        (f"{memory} has no own kernel", not has_kernel),
    )
    for why_not, applies in refusals:
        if applies and why_not is not None:
            return _note(Plan("aten", why_not))
    if device == "cuda":
        return _note(Plan("native", f"{memory}: Triton kernels, whose programs share out {piece}"))
    return _note(Plan("native", f"{memory}: {piece} is normalised while it is in cache"))


def memory_order(*, device: str, dtype: torch.dtype) -> Plan:
    """Choose the memory order of a network's activations, once, at its entry.

    Args:
        device: Device type of the input.
        dtype: That convolutions compute in.

    Returns:
        Algorithm ``"batch_last"`` or ``"contiguous"``, with which stock operators run, and the reason.
    """
    if why_not := kernel_why_not("conv2d", device, dtype):
        return _note(Plan("contiguous", why_not))
    if device == "cuda":
        if _STOCK_FASTER and (times := _STOCK_FASTER.get((gpu_generation(), dtype))):
            why = f"stock operators were measured {times:.1f} times faster on {gpu_generation()}"
            return _note(Plan("contiguous", why))
        return _note(Plan("batch_last", "the own kernels take samples innermost only"))
    return _note(Plan("batch_last", "the own kernels are fastest with samples innermost, however few"))
