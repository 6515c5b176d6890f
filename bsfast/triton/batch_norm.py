"""Batch normalisation with the statistics of the batch, a residual and a ReLU: what launches the kernels."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bsfast.triton import tensors
from bsfast.triton.batch_norm_kernels import (
    coefficients,
    gradient_coefficients,
    input_gradient,
    normalise,
    tile_gradients,
    tile_moments,
)


class Channels(NamedTuple):
    """Sizes of activations as the kernels take them, and the tiles of a unit."""

    units: int
    repeats: int
    channels: int
    length: int
    rows: int
    columns: int

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return triton.cdiv(self.length, self.columns)

    @property
    def tiles(self) -> int:
        """Tiles of a unit."""
        return triton.cdiv(self.repeats, self.rows) * self.across

    @property
    def sizes(self) -> tuple[int, ...]:
        """The arguments that :func:`locate` wants first."""
        return self.repeats, self.channels, self.length, self.across, self.tiles

    @property
    def tile(self) -> dict[str, int]:
        """Those that are compiled in."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": tensors.warps(self.rows * self.columns)}


def batch_norm_out(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor,
    shift: Tensor,
    inv: Tensor,
    eps: float,
    relu: bool,
    known: bool,
) -> None:
    """The operator of this name: statistics, coefficients and, unless y is None, the result."""
    s = _describe("batch_norm_out", (x, y, residual), (mean, variance, scale, shift, inv), (weight, bias))
    if x.numel() == 0:
        return
    acc, grid = tensors.accumulator(x), (s.units * s.tiles,)
    with torch.cuda.device_of(x):
        partial = None if known else x.new_empty((3, *grid), dtype=torch.float64)
        if partial is not None:
            tile_moments[grid](x, partial, *s.sizes, ACC=acc, **s.tile)
        statistics = (mean, variance, scale, shift, inv)
        coefficients[s.units,](partial, weight, bias, *statistics, s.tiles, eps, BLOCK=tensors.MERGED, num_warps=1)
        if y is not None:
            normalise[grid](x, residual, y, scale, shift, *s.sizes, ACC=acc, RELU=relu, **s.tile)


def batch_norm_grad_out(
    x: Tensor,
    y: Tensor | None,
    grad: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    inv: Tensor,
    x_grad: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor,
    residual_grad: Tensor | None,
    relu: bool,
) -> None:
    """The operator of this name: gradients of :func:`batch_norm_out`."""
    statistics = (mean, scale, shift, inv, weight_grad, bias_grad)
    s = _describe("batch_norm_grad_out", (x, grad, x_grad, y, residual_grad), statistics, ())
    if x.numel() == 0:
        return
    acc, grid = tensors.accumulator(x), (s.units * s.tiles,)
    with torch.cuda.device_of(x):
        partial = mean.new_empty((2, *grid))
        slope, offset = (mean.new_empty(s.units) for _ in range(2))  # each aligned, which compiled code depends on
        tile_gradients[grid](
            x, y, grad, mean, scale, shift, residual_grad, partial, *s.sizes, ACC=acc, RELU=relu, **s.tile
        )
        gradient_coefficients[s.units,](
            partial, scale, inv, weight_grad, bias_grad, slope, offset, s.repeats * s.length, s.tiles,
            BLOCK=tensors.MERGED, num_warps=1,
        )  # fmt: skip
        if residual_grad is not None:  # it has passed the ReLU
            y, grad, relu = None, residual_grad, False
        input_gradient[grid](
            x, y, grad, mean, scale, shift, slope, offset, x_grad, *s.sizes, ACC=acc, RELU=relu, **s.tile
        )


def _describe(
    op: str,
    activations: tuple[Tensor | None, ...],
    statistics: tuple[Tensor, ...],
    affine: tuple[Tensor | None, ...],
) -> Channels:
    contiguous = tensors.is_contiguous(op, activations)
    x = activations[0]
    assert x is not None  # noqa: S101 (for the type checker)
    branches, samples, channels, height, width = x.shape
    own = torch.promote_types(x.dtype, torch.float32)
    for t, dtypes in [*((t, (own,)) for t in statistics), *((t, (own, x.dtype)) for t in affine)]:
        if t is not None:
            tensors.check_size(op, "every statistic and coefficient", t, (branches, channels))
            expected = "the activations' dtype, or float32 where that has 16 bits"
            tensors.check_kind(op, "every statistic and coefficient", t, x, dtypes, expected)
    rows, length = (samples, height * width) if contiguous else (1, height * width * samples)
    return Channels(branches * channels, rows, channels, length, *tensors.tile_of(rows, length))
