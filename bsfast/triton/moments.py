"""Sums over tiles and how tiles are merged: each tile about its own mean, then in float64 in a fixed order.

What is merged lies in memory as ``[quantity, unit, tile, lane]``; a unit is what has one mean in every lane.
"""

import triton
import triton.language as tl


@triton.jit
def moments(values, mask, count, axis: tl.constexpr):
    """Mean and sum of squared deviations along an axis, or over all elements, of a tile with ``count`` in the mask."""
    # The mean is rounded: what is left of it is in the deviations, and matters where it is far larger than they are.
    centre = tl.sum(values, axis) / count.to(values.dtype)
    around = centre if axis is None else tl.expand_dims(centre, axis)
    deviations = tl.where(mask, values - around, 0.0)
    total = tl.sum(deviations, axis).to(tl.float64)
    rest = total / count.to(tl.float64)
    squares = tl.sum(deviations * deviations, axis).to(tl.float64) - total * rest
    return centre.to(tl.float64) + rest, squares


@triton.jit
def merge_moments(partial, plane, first, tiles, lanes, lane, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Merge sets of which count, mean and squared deviations are given (Chan et al., 1979).

    Args:
        partial: Where they are, ``[3, unit, tile, lane]`` in float64.
        plane: Elements of each of the three.
        first: Where the unit's begin.
        tiles: Number of sets.
        lanes: Number of lanes.
        lane: Which lanes are wanted, ``[LANES]``.
        BLOCK: Sets that are read at once.
        LANES: Number of lanes that are wanted.

    Returns:
        Mean and variance, ``[LANES]`` in float64.
    """
    count = tl.zeros([LANES], tl.float64)
    mean = tl.zeros([LANES], tl.float64)
    squares = tl.zeros([LANES], tl.float64)
    for begin in range(0, tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        at = partial + first + tile.to(tl.int64)[:, None] * lanes + lane[None, :]
        mask = (tile < tiles)[:, None] & (lane < lanes)[None, :]
        counts = tl.load(at, mask, other=0.0)
        means = tl.load(at + plane, mask, other=0.0)
        own = tl.load(at + 2 * plane, mask, other=0.0)
        added = tl.maximum(tl.sum(counts, 0), 1.0)  # lanes beyond the last have nothing to divide
        centre = tl.sum(counts * means, 0) / added
        deviations = means - centre[None, :]
        own_squares = tl.sum(own + counts * deviations * deviations, 0)
        share = added / (count + added)
        delta = centre - mean
        mean += delta * share
        squares += own_squares + delta * delta * count * share
        count += added
    return mean, squares / count


@triton.jit
def merge_sums(partial, tiles, stride, lanes, lane, lane_stride, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Sum, ``[LANES]`` in float64, over tiles that are a stride apart; arguments as above."""
    total = tl.zeros([LANES], tl.float64)
    for begin in range(0, tiles, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        at = partial + tile.to(tl.int64)[:, None] * stride + lane[None, :] * lane_stride
        total += tl.sum(tl.load(at, (tile < tiles)[:, None] & (lane < lanes)[None, :], other=0.0).to(tl.float64), 0)
    return total
