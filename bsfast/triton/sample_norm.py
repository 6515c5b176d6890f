"""Normalisation of each sample over groups of its channels, with an affine map and a leaky ReLU: the launchers."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bsfast.triton import tensors
from bsfast.triton.sample_norm_kernels import (
    channel_gradients,
    group_gradients,
    group_moments,
    input_gradient,
    normalise,
    tile_gradients,
    tile_moments,
)

MOST_LANES = 32  # of a tile on batch-last memory: samples of a row that are read at once


class Rows(NamedTuple):
    """Units of ``lanes`` lanes of ``rows`` elements, and their tiles."""

    units: int
    rows: int
    lanes: int
    tile_rows: int
    tile_lanes: int

    @property
    def tiles(self) -> int:
        """Tiles of a unit, along its rows."""
        return triton.cdiv(self.rows, self.tile_rows)

    @property
    def lane_tiles(self) -> int:
        """Tiles of a row."""
        return triton.cdiv(self.lanes, self.tile_lanes)

    @property
    def grid(self) -> tuple[int]:
        """A program a tile."""
        return (self.units * self.tiles * self.lane_tiles,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The arguments of a kernel of tiles."""
        return self.rows, self.lanes, self.tiles, self.lane_tiles

    @property
    def tile(self) -> dict[str, int]:
        """Those that are compiled in."""
        elements = self.tile_rows * self.tile_lanes
        return {"ROWS": self.tile_rows, "LANES": self.tile_lanes, "num_warps": tensors.warps(elements)}

    @property
    def merge_grid(self) -> tuple[int]:
        """A program for the lanes of a unit's tiles."""
        return (self.units * self.lane_tiles,)

    @property
    def merge_tile(self) -> dict[str, int]:
        """What is compiled into the kernels that merge tiles."""
        block = max(1, tensors.MERGED // self.tile_lanes)
        return {"BLOCK": block, "LANES": self.tile_lanes, "num_warps": tensors.warps(block * self.tile_lanes)}


class Groups(NamedTuple):
    """Sizes of activations as the kernels take them.

    Attributes:
        groups: Rows of groups of channels.
        channels: Rows of channels.
        sizes: Channels of a sample, samples whose channels are lanes of their own, channels of a group.
        contiguous: Which memory order this is.
        per_sample: Shape of what there is one of for each sample and group; for each sample and channel.
    """

    groups: Rows
    channels: Rows
    sizes: tuple[int, int, int]
    contiguous: bool
    per_sample: tuple[tuple[int, ...], tuple[int, ...]]


def sample_norm_out(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    mean: Tensor,
    inv: Tensor,
    variance: Tensor,
    groups: int,
    eps: float,
    slope: float,
) -> None:
    """The operator of this name: statistics and result."""
    op = "sample_norm_out"
    s = _describe(op, (x, y), groups)
    _check_statistics(op, x, s, mean, inv, variance)
    kinds = {
        "SCALE_PER_SAMPLE": _check_coefficient(op, "scale", x, s, scale),
        "SHIFT_PER_SAMPLE": _check_coefficient(op, "shift", x, s, shift),
    }
    if x.numel() == 0:
        return
    g, c = s.groups, s.channels
    settings = {"ACC": tensors.accumulator(x), "CONTIGUOUS": s.contiguous}
    with torch.cuda.device_of(x):
        partial = mean.new_empty(3 * g.tiles * mean.numel())
        tile_moments[g.grid](x, partial, *g.sizes, **settings, **g.tile)
        group_moments[g.merge_grid](partial, mean, inv, variance, *g.sizes[1:], eps, **g.merge_tile)
        normalise[c.grid](x, scale, shift, y, mean, inv, *c.sizes, *s.sizes, SLOPE=slope, **kinds, **settings, **c.tile)


def sample_norm_grad_out(
    x: Tensor,
    y: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    inv: Tensor,
    x_grad: Tensor,
    scale_grad: Tensor,
    shift_grad: Tensor,
    groups: int,
    slope: float,
) -> None:
    """The operator of this name: gradients of :func:`sample_norm_out`."""
    op = "sample_norm_grad_out"
    s = _describe(op, (x, y, grad, x_grad), groups)
    _check_statistics(op, x, s, mean, inv)
    for name, t in (("scale_grad", scale_grad), ("shift_grad", shift_grad)):
        tensors.check_size(op, name, t, s.per_sample[1])
        tensors.check_kind(op, name, t, x, (torch.promote_types(x.dtype, torch.float32),), "the right dtype")
    kind = {"SCALE_PER_SAMPLE": _check_coefficient(op, "scale", x, s, scale)}
    if x.numel() == 0:
        return
    g, c, own = s.groups, s.channels, s.sizes[2]
    settings = {"ACC": tensors.accumulator(x), "CONTIGUOUS": s.contiguous}
    with torch.cuda.device_of(x):
        partial = scale_grad.new_empty(2 * c.tiles * scale_grad.numel())
        weighted = mean.new_empty(2 * scale_grad.numel())
        tilt, offset = (scale_grad.new_empty(mean.numel()) for _ in range(2))  # each aligned, as compiled code expects
        tile_gradients[c.grid](x, y, grad, mean, partial, *c.sizes, own, SLOPE=slope, **settings, **c.tile)
        into = (scale_grad, shift_grad, weighted)
        channel_gradients[c.merge_grid](
            partial, scale, mean, inv, *into, *c.sizes[1:], *s.sizes, **settings, **kind, **c.merge_tile
        )
        group_gradients[g.merge_grid](
            weighted, mean, inv, tilt, offset, g.lanes, g.lane_tiles, own, g.rows, **settings, **g.merge_tile
        )
        statistics = (mean, inv, tilt, offset)
        input_gradient[c.grid](
            x, y, grad, scale, *statistics, x_grad, *c.sizes, *s.sizes, SLOPE=slope, **kind, **settings, **c.tile
        )


def _describe(op: str, activations: tuple[Tensor, ...], groups: int) -> Groups:
    contiguous = tensors.is_contiguous(op, activations)
    branches, samples, channels, height, width = activations[0].shape
    if groups < 1 or channels % groups:
        raise RuntimeError(f"{op}: groups must divide C={channels}, got {groups}")
    image, own = height * width, channels // groups

    def rows(count: int, length: int) -> Rows:
        if contiguous:
            lanes, height = branches * samples * count, min(triton.next_power_of_2(length), tensors.TILE)
            return Rows(1, length, lanes, height, min(triton.next_power_of_2(lanes), tensors.TILE // height))
        width = min(triton.next_power_of_2(samples), MOST_LANES)
        height = min(triton.next_power_of_2(length), tensors.TILE // width)
        return Rows(branches * count, length, samples, height, width)

    def per_sample(count: int) -> tuple[int, ...]:
        return (branches, samples, count) if contiguous else (branches, count, samples)

    sizes = (channels, samples if contiguous else 1, own)
    shapes = (per_sample(groups), per_sample(channels))
    return Groups(rows(groups, own * image), rows(channels, image), sizes, contiguous, shapes)


def _check_statistics(op: str, x: Tensor, s: Groups, *statistics: Tensor) -> None:
    for t in statistics:
        tensors.check_size(op, "every statistic", t, s.per_sample[0])
        tensors.check_kind(op, "every statistic", t, x, (torch.float64,), "the right dtype")


def _check_coefficient(op: str, name: str, x: Tensor, s: Groups, t: Tensor | None) -> bool:
    """Check a coefficient; say whether it has one value for each sample."""
    if t is None:
        return False
    dtypes, own = (x.dtype, torch.promote_types(x.dtype, torch.float32)), t.dim() == 3
    tensors.check_size(op, name, t, s.per_sample[1] if own else (x.shape[0], x.shape[2]))
    tensors.check_kind(op, name, t, x, dtypes, "the right dtype" if own else "x's dtype, or float32")
    return own
