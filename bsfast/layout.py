"""The batch-last memory format: a logical ``(M, N, C, H, W)`` tensor whose samples are innermost in memory.

It is a memory format in the way ``torch.channels_last`` is one: shapes, indexing and every aten operator work
unchanged; only the strides are those of ``[M][C][H][W][N]``. Inputs shared by all branches have no M axis.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def to_batch_last(x: Tensor) -> Tensor:
    """Return ``x`` with its samples innermost in memory; ``x`` itself if they already are.

    Args:
        x: Shape ``(M, N, C, H, W)`` or, shared by all branches, ``(N, C, H, W)``.

    Returns:
        Same values and shape, memory order ``[M][C][H][W][N]``.
    """
    return x if is_batch_last(x) else x.movedim(-4, -1).contiguous().movedim(-1, -4)


def is_batch_last(x: Tensor) -> bool:
    """Say whether a 4-D or 5-D tensor is dense with its samples innermost in memory.

    Where sizes of 1 make the two orders the same (one sample, or one pixel of one channel) the tensor counts as
    contiguous, and so does an empty one: nothing could be won by treating its samples as vector lanes.

    Args:
        x: Any tensor.

    Returns:
        Whether its memory order is ``[M][C][H][W][N]``, and not also ``[M][N][C][H][W]``.
    """
    return x.dim() in {4, 5} and not x.is_contiguous() and _same_strides(x, batch_last_strides(x.shape))


def empty_batch_last(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate an uninitialised batch-last tensor of shape ``(M, N, C, H, W)`` or ``(N, C, H, W)``."""
    return torch.empty_strided(tuple(shape), batch_last_strides(shape), dtype=dtype, device=device)


def batch_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of the batch-last tensor of this shape."""
    *_, samples, channels, height, width = shape
    strides = (1, height * width * samples, width * samples, samples)
    return (math.prod((samples, channels, height, width)), *strides) if len(shape) == 5 else strides


def _same_strides(x: Tensor, strides: Sequence[int]) -> bool:
    """Compare strides on the axes where they matter; a length of 1 makes a stride meaningless."""
    if x.stride() == strides:
        return True
    return all(size == 1 or have == want for size, have, want in zip(x.shape, x.stride(), strides, strict=True))
