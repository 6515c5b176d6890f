"""Conversion of activations to batch-last memory, by a kernel where there is one."""

import math
from typing import Any

import torch
from torch import Tensor

from bsfast import layout
from bsfast.ops.backend import kernel_why_not
from bsfast.ops.functorch import has_memory, transforms_active


def to_batch_last(x: Tensor) -> Tensor:
    """:func:`bsfast.layout.to_batch_last`, on a GPU by tiles whose reads and writes are both of neighbours in memory.

    Args:
        x: Shape ``(M, N, C, H, W)`` or, shared by all branches, ``(N, C, H, W)``.

    Returns:
        Same values and shape, memory order ``[M][C][H][W][N]``; ``x`` itself if it has that.
    """
    if torch.compiler.is_compiling() or transforms_active() or not has_memory(x):
        return layout.to_batch_last(x)
    differs = x.numel() > 0 and min(x.shape[-4], math.prod(x.shape[-3:])) > 1  # else both orders are the same
    if not (differs and x.is_contiguous()) or kernel_why_not("layout", x.device.type, x.dtype) is not None:
        return layout.to_batch_last(x)
    converted: Tensor = _ToBatchLast.apply(x)  # type: ignore[no-untyped-call]
    return converted


class _ToBatchLast(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        out = layout.empty_batch_last(x.shape, dtype=x.dtype, device=x.device)
        matrices = x.view(math.prod(x.shape[:-4]), x.shape[-4], math.prod(x.shape[-3:]))
        torch.ops.bsfast.transpose_out(matrices, out.movedim(-4, -1).view(matrices.mT.shape))
        return out

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad  # of the same values, whatever memory order it has
