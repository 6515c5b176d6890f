"""Products of all rows of matrices with each other."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsfast.triton.tensors import check_kind, check_size

SIDE, DEPTH, WARPS = 64, 16, 8


@triton.jit(do_not_specialize=("tiles",))
def gram(
    x,  # [matrix, row, column]
    weights,  # [column], or None
    out,  # [matrix, row, row]
    rows,
    columns,
    tiles,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute x diag(weights) x^T; a program owns a tile on or above the diagonal, and its mirror image."""
    matrix = (tl.program_id(0) // tiles // tiles).to(tl.int64)
    up, down = tl.program_id(0) // tiles % tiles, tl.program_id(0) % tiles
    if up <= down:
        x += matrix * rows * columns
        out += matrix * rows * rows
        left_row = up.to(tl.int64) * SIDE + tl.arange(0, SIDE)
        right_row = down.to(tl.int64) * SIDE + tl.arange(0, SIDE)
        sums = tl.zeros((SIDE, SIDE), tl.float32)
        for first in range(0, columns, DEPTH):
            column = first + tl.arange(0, DEPTH)
            inside = column < columns
            left = tl.load(x + left_row[:, None] * columns + column, (left_row < rows)[:, None] & inside, 0.0)
            right = tl.load(x + right_row[:, None] * columns + column, (right_row < rows)[:, None] & inside, 0.0)
            if weights is not None:
                right *= tl.load(weights + column, inside, 0.0)
            sums = tl.dot(left, right.T, sums, input_precision="ieee")
        mask = (left_row < rows)[:, None] & (right_row < rows)
        tl.store(out + left_row[:, None] * rows + right_row, sums, mask)
        if up < down:
            tl.store(out + left_row[:, None] + right_row * rows, sums, mask)


def gram_out(x: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """The operator of this name.

    Args:
        x: Shape ``(B, R, K)``, float32, contiguous.
        weights: Shape ``(K,)``, likewise, or None for 1.
        out: Shape ``(B, R, R)``, likewise.

    Raises:
        RuntimeError: If they are anything else.
    """
    if x.dim() != 3:
        raise RuntimeError(f"gram_out: x must have shape (B, R, K), got {tuple(x.shape)}")
    count, rows, columns = x.shape
    check_size("gram_out", "out", out, (count, rows, rows))
    if weights is not None:
        check_size("gram_out", "weights", weights, (columns,))
    for name, t in (("x", x), ("out", out), ("weights", weights)):
        if t is not None:
            check_kind("gram_out", name, t, x, (torch.float32,), "dtype float32")
    if out.numel() == 0:
        return
    tiles = triton.cdiv(rows, SIDE)
    with torch.cuda.device_of(x):
        gram[count * tiles * tiles,](x, weights, out, rows, columns, tiles, SIDE=SIDE, DEPTH=DEPTH, num_warps=WARPS)
