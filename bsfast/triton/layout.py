"""Transposition of matrices in memory, which is what changes the memory order of activations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE = 32  # of a tile, whose rows are read and whose columns are written at once


@triton.jit(do_not_specialize=("across", "tiles"))
def transpose(
    x,  # [matrix, row, column]
    out,  # [matrix, column, row]
    rows,
    columns,
    across,
    tiles,
    SIDE: tl.constexpr,
):
    """Transpose matrices; a program owns a tile of one."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64) * rows * columns
    tile = tl.program_id(0) % tiles
    row = (tile // across).to(tl.int64) * SIDE + tl.arange(0, SIDE)[:, None]
    column = (tile % across).to(tl.int64) * SIDE + tl.arange(0, SIDE)[None, :]
    mask = (row < rows) & (column < columns)
    tl.store(out + matrix + column * rows + row, tl.load(x + matrix + row * columns + column, mask), mask)


def transpose_out(x: Tensor, out: Tensor) -> None:
    """The operator of this name.

    Args:
        x: Shape ``(B, R, C)``, contiguous.
        out: Shape ``(B, C, R)``, contiguous.

    Raises:
        RuntimeError: If they are anything else.
    """
    if x.dim() != 3 or out.shape != x.mT.shape or out.dtype != x.dtype or out.device != x.device:
        raise RuntimeError(
            f"transpose_out: out must be as x with its last two axes exchanged, got {out.dtype} {tuple(out.shape)} for "
            f"{x.dtype} {tuple(x.shape)}"
        )
    if not (x.is_contiguous() and out.is_contiguous()):
        raise RuntimeError("transpose_out: x and out must be contiguous")
    if x.numel() == 0:
        return
    count, rows, columns = x.shape
    across = triton.cdiv(columns, SIDE)
    tiles = triton.cdiv(rows, SIDE) * across
    with torch.cuda.device_of(x):
        transpose[count * tiles,](x, out, rows, columns, across, tiles, SIDE=SIDE, num_warps=4)
