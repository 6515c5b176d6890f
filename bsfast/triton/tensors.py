"""What launchers share: checks that guard memory, in the form of those in csrc/cpu, and sizes of tiles."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsfast.layout import batch_last_strides

TILE = 2048  # elements that a program reads at once; of twice as many, a kernel for sm_90 spills
MERGED = 256  # sums of tiles that a program reads at once
_PER_WARP = 256  # elements: 8 a thread, one load of 16-bit numbers


def accumulator(x: Tensor) -> tl.dtype:
    """In what the kernels compute with elements of x."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def warps(elements: int) -> int:
    """Number of warps for a tile."""
    return max(1, min(8, elements // _PER_WARP))


def tile_of(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of the tiles that share out a matrix, columns before rows."""
    width = min(triton.next_power_of_2(columns), TILE)
    return min(triton.next_power_of_2(rows), TILE // width), width


def is_contiguous(op: str, activations: Sequence[Tensor | None]) -> bool:
    """Check that all are activations of one shape, dtype and memory order; say whether that is the contiguous one.

    Args:
        op: Of which operator.
        activations: x, which counts as the right one, and others.

    Returns:
        Whether they are contiguous, or else batch-last.

    Raises:
        RuntimeError: If they are not alike.
    """
    present = [t for t in activations if t is not None]
    x = present[0]
    if x.dim() != 5:
        raise RuntimeError(f"{op}: x must have shape (M, N, C, H, W), got {_text(x.shape)}")
    for t in present:
        check_size(op, "every activation", t, x.shape)
        if t.dtype != x.dtype or t.device != x.device:
            raise RuntimeError(f"{op}: all tensors must have one dtype and device, got {t.dtype} and {x.dtype}")
    if all(t.is_contiguous() for t in present):
        return True
    expected = batch_last_strides(x.shape)
    for t in present:
        if t.numel() and any(n > 1 and s != e for n, s, e in zip(t.shape, t.stride(), expected, strict=True)):
            raise RuntimeError(
                f"{op}: every activation must be batch-last in memory, got strides {_text(t.stride())} for shape "
                f"{_text(t.shape)}"
            )
    return False


def check_size(op: str, name: str, t: Tensor, shape: Sequence[int]) -> None:
    """Check the shape of an operand.

    Args:
        op: Of which operator.
        name: Of the operand.
        t: The operand.
        shape: That it must have.

    Raises:
        RuntimeError: If it has another one.
    """
    if tuple(t.shape) != tuple(shape):
        raise RuntimeError(f"{op}: {name} must have shape {_text(shape)}, got {_text(t.shape)}")


def check_kind(op: str, name: str, t: Tensor, x: Tensor, dtypes: Sequence[torch.dtype], expected: str) -> None:
    """Check that an operand beside the activations is contiguous, on their device and of one of these dtypes.

    Args:
        op: Of which operator.
        name: Of the operand.
        t: The operand.
        x: The activations.
        dtypes: That it may have.
        expected: These in words.

    Raises:
        RuntimeError: If it is anything else.
    """
    if not t.is_contiguous() or t.dtype not in dtypes or t.device != x.device:
        raise RuntimeError(
            f"{op}: {name} must be contiguous and have {expected}, got {t.dtype} with strides {_text(t.stride())}"
        )


def _text(numbers: Sequence[int]) -> str:
    return f"({', '.join(map(str, numbers))})"
