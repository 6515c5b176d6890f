"""Normalisation of each sample over groups of its channels, an affine map and a leaky ReLU: the kernels.

What has a mean of its own is a lane, whose elements are rows. On batch-last memory activations are ``[unit, row,
lane]``: a unit is a group, or a channel, of a branch, and a lane a sample; on contiguous memory they are ``[lane,
row]``, a lane is a group, or a channel, of a sample, and there is one unit. Tiles, each of a program, share out rows
and lanes.
"""

import triton
import triton.language as tl

from bsfast.triton.moments import merge_moments, merge_sums, moments

# One kernel for all; what is left tells alignment.
UNSPECIALISED = ("tiles", "lane_tiles", "channels", "samples", "group_channels", "count")


@triton.jit
def locate(rows, lanes, tiles, lane_tiles, CONTIGUOUS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Unit and tile of this program, its lanes, offsets and mask of the elements, and how many rows there are."""
    first = (tl.program_id(0) % lane_tiles).to(tl.int64) * LANES
    tile = tl.program_id(0) // lane_tiles % tiles
    unit = (tl.program_id(0) // lane_tiles // tiles).to(tl.int64)
    row = tile.to(tl.int64) * ROWS
    here = tl.minimum(rows - row, ROWS).to(tl.int32)
    down = tl.arange(0, ROWS)[:, None]
    right = tl.arange(0, LANES)[None, :]
    if CONTIGUOUS:
        at = first * rows + row + right * rows + down
    else:
        at = (unit * rows + row) * lanes + first + down * lanes + right
    return unit, tile, first + tl.arange(0, LANES), at, (down < here) & (right < lanes - first), here


@triton.jit
def group_of(unit, lane, lanes, group_channels, CONTIGUOUS: tl.constexpr):
    """Where in ``[group, lane]`` that of the lanes of a channel is."""
    return lane // group_channels if CONTIGUOUS else unit // group_channels * lanes + lane


@triton.jit
def coefficient(values, unit, lane, lanes, channels, samples, PER_SAMPLE: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """One of each lane of a channel, or one of all, in float64; 1 where there are none."""
    if values is None:
        own = tl.full([1], 1, tl.float64)
    elif PER_SAMPLE:
        own = tl.load(values + unit * lanes + lane, lane < lanes, other=0.0).to(tl.float64)
    elif CONTIGUOUS:
        at = lane // channels // samples * channels + lane % channels
        own = tl.load(values + at, lane < lanes, other=0.0).to(tl.float64)
    else:
        at = unit // channels // samples * channels + unit % channels
        own = tl.load(values + at + tl.arange(0, 1)).to(tl.float64)
    return own


@triton.jit(do_not_specialize=UNSPECIALISED)
def tile_moments(
    x,  # activation
    partial,  # [3, group, tile, lane]: count, mean, squared deviations
    rows,
    lanes,
    tiles,
    lane_tiles,
    ACC: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Moments of each lane of a tile."""
    unit, tile, lane, at, mask, here = locate(rows, lanes, tiles, lane_tiles, CONTIGUOUS, ROWS, LANES)
    mean, squares = moments(tl.load(x + at, mask, other=0.0).to(ACC), mask, here, 0)
    to = partial + (unit * tiles + tile) * lanes + lane
    plane = (tl.num_programs(0) // lane_tiles).to(tl.int64) * lanes
    tl.store(to, tl.full([LANES], 0, tl.float64) + here, lane < lanes)
    tl.store(to + plane, mean, lane < lanes)
    tl.store(to + 2 * plane, squares, lane < lanes)


@triton.jit(do_not_specialize=UNSPECIALISED)
def group_moments(
    partial,  # as above
    mean,  # [group, lane] in float64, as those that follow
    inv,
    variance,
    lanes,
    tiles,
    lane_tiles,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Mean, variance and 1 / sqrt(variance + eps) of the lanes of a group."""
    unit = (tl.program_id(0) // lane_tiles).to(tl.int64)
    lane = (tl.program_id(0) % lane_tiles).to(tl.int64) * LANES + tl.arange(0, LANES)
    plane = (tl.num_programs(0) // lane_tiles).to(tl.int64) * tiles * lanes
    own_mean, own_variance = merge_moments(partial, plane, unit * tiles * lanes, tiles, lanes, lane, BLOCK, LANES)
    at = unit * lanes + lane
    tl.store(mean + at, own_mean, lane < lanes)
    tl.store(variance + at, own_variance, lane < lanes)
    tl.store(inv + at, 1 / tl.sqrt(own_variance + tl.full(own_variance.shape, EPS, tl.float64)), lane < lanes)


@triton.jit(do_not_specialize=UNSPECIALISED)
def normalise(
    x,  # activation, as y
    scale,  # [branch, channel], or [channel, lane], or None
    shift,  # likewise
    y,
    mean,  # [group, lane] in float64
    inv,
    rows,
    lanes,
    tiles,
    lane_tiles,
    channels,
    samples,
    group_channels,
    SLOPE: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    SHIFT_PER_SAMPLE: tl.constexpr,
    ACC: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The result act(scale (x - mean) inv + shift), of a tile of a channel."""
    unit, _, lane, at, mask, _ = locate(rows, lanes, tiles, lane_tiles, CONTIGUOUS, ROWS, LANES)
    group = group_of(unit, lane, lanes, group_channels, CONTIGUOUS)
    own_mean = tl.load(mean + group, lane < lanes, other=0.0)
    centre = own_mean.to(ACC)
    factor = coefficient(scale, unit, lane, lanes, channels, samples, SCALE_PER_SAMPLE, CONTIGUOUS)
    factor *= tl.load(inv + group, lane < lanes, other=0.0)
    offset = (centre.to(tl.float64) - own_mean) * factor
    if shift is not None:
        offset += coefficient(shift, unit, lane, lanes, channels, samples, SHIFT_PER_SAMPLE, CONTIGUOUS)
    values = tl.load(x + at, mask, other=0.0).to(ACC) - centre[None, :]
    values = tl.fma(values, factor.to(ACC)[None, :], offset.to(ACC)[None, :])
    if SLOPE != 1:
        values = tl.where(values > 0, values, values * tl.full([1, 1], SLOPE, ACC))
    tl.store(y + at, values, mask)


@triton.jit
def passing(grad, y, at, mask, SLOPE: tl.constexpr):
    """The gradient behind the activation, whose result is y."""
    if SLOPE != 1:
        result = tl.load(y + at, mask, other=0.0).to(grad.dtype)
        grad = tl.where(result > 0, grad, grad * tl.full([1, 1], SLOPE, grad.dtype))
    return grad


@triton.jit(do_not_specialize=UNSPECIALISED)
def tile_gradients(
    x,  # activation, as y and grad
    y,
    grad,
    mean,  # [group, lane] in float64
    partial,  # [2, channel, tile, lane]: sums of g and of g (x - centre)
    rows,
    lanes,
    tiles,
    lane_tiles,
    group_channels,
    SLOPE: tl.constexpr,
    ACC: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums of the gradient g behind the activation over each lane of a tile; the centre is the rounded mean."""
    unit, tile, lane, at, mask, _ = locate(rows, lanes, tiles, lane_tiles, CONTIGUOUS, ROWS, LANES)
    centre = tl.load(mean + group_of(unit, lane, lanes, group_channels, CONTIGUOUS), lane < lanes, other=0.0).to(ACC)
    g = passing(tl.load(grad + at, mask, other=0.0).to(ACC), y, at, mask, SLOPE)
    deviations = tl.load(x + at, mask, other=0.0).to(ACC) - centre[None, :]
    to = partial + (unit * tiles + tile) * lanes + lane
    tl.store(to, tl.sum(g, 0), lane < lanes)
    plane = (tl.num_programs(0) // lane_tiles).to(tl.int64) * lanes
    tl.store(to + plane, tl.sum(g * deviations, 0), lane < lanes)


@triton.jit(do_not_specialize=UNSPECIALISED)
def channel_gradients(
    partial,  # as above
    scale,  # as for normalise
    mean,  # [group, lane] in float64
    inv,
    scale_grad,  # [channel, lane]
    shift_grad,
    weighted,  # [2, channel, lane] in float64: these times the scale
    lanes,
    tiles,
    lane_tiles,
    channels,
    samples,
    group_channels,
    SCALE_PER_SAMPLE: tl.constexpr,
    ACC: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradients of scale and shift, for the lanes of a channel."""
    unit = (tl.program_id(0) // lane_tiles).to(tl.int64)
    lane = (tl.program_id(0) % lane_tiles).to(tl.int64) * LANES + tl.arange(0, LANES)
    all_lanes = (tl.num_programs(0) // lane_tiles).to(tl.int64) * lanes
    own = partial + unit * lanes * tiles
    total = merge_sums(own, tiles, lanes, lanes, lane, 1, BLOCK, LANES)
    product = merge_sums(own + all_lanes * tiles, tiles, lanes, lanes, lane, 1, BLOCK, LANES)
    group = group_of(unit, lane, lanes, group_channels, CONTIGUOUS)
    own_mean = tl.load(mean + group, lane < lanes, other=0.0)
    rest = own_mean - own_mean.to(ACC).to(tl.float64)
    normalised = (product - rest * total) * tl.load(inv + group, lane < lanes, other=0.0)
    own_scale = coefficient(scale, unit, lane, lanes, channels, samples, SCALE_PER_SAMPLE, CONTIGUOUS)
    at = unit * lanes + lane
    tl.store(shift_grad + at, total, lane < lanes)
    tl.store(scale_grad + at, normalised, lane < lanes)
    tl.store(weighted + at, own_scale * total, lane < lanes)
    tl.store(weighted + all_lanes + at, own_scale * normalised, lane < lanes)


@triton.jit(do_not_specialize=UNSPECIALISED)
def group_gradients(
    weighted,  # as above
    mean,  # [group, lane] in float64
    inv,
    tilt,  # [group, lane]
    offset,
    lanes,
    lane_tiles,
    group_channels,
    count,
    ACC: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """What x_grad = scale inv g + tilt (x - centre) + offset needs, for the lanes of a group."""
    unit = (tl.program_id(0) // lane_tiles).to(tl.int64)
    lane = (tl.program_id(0) % lane_tiles).to(tl.int64) * LANES + tl.arange(0, LANES)
    all_lanes = (tl.num_programs(0) // lane_tiles).to(tl.int64) * lanes
    at = unit * lanes + lane
    own = weighted + unit * lanes * group_channels
    stride = 1 if CONTIGUOUS else lanes
    lane_stride = group_channels if CONTIGUOUS else 1
    first = merge_sums(own, group_channels, stride, lanes, lane, lane_stride, BLOCK, LANES)
    own += all_lanes * group_channels
    products = merge_sums(own, group_channels, stride, lanes, lane, lane_stride, BLOCK, LANES)
    own_mean = tl.load(mean + at, lane < lanes, other=0.0)
    own_inv = tl.load(inv + at, lane < lanes, other=0.0)
    own_tilt = -own_inv * own_inv * products / count
    rest = own_mean - own_mean.to(ACC).to(tl.float64)
    tl.store(tilt + at, own_tilt, lane < lanes)
    tl.store(offset + at, -own_inv * first / count - own_tilt * rest, lane < lanes)


@triton.jit(do_not_specialize=UNSPECIALISED)
def input_gradient(
    x,  # activation, as y, grad and x_grad
    y,
    grad,
    scale,  # as for normalise
    mean,  # [group, lane] in float64, as inv
    inv,
    tilt,  # [group, lane]
    offset,
    x_grad,
    rows,
    lanes,
    tiles,
    lane_tiles,
    channels,
    samples,
    group_channels,
    SLOPE: tl.constexpr,
    SCALE_PER_SAMPLE: tl.constexpr,
    ACC: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradient of x, of a tile of a channel."""
    unit, _, lane, at, mask, _ = locate(rows, lanes, tiles, lane_tiles, CONTIGUOUS, ROWS, LANES)
    group = group_of(unit, lane, lanes, group_channels, CONTIGUOUS)
    centre = tl.load(mean + group, lane < lanes, other=0.0).to(ACC)
    factor = coefficient(scale, unit, lane, lanes, channels, samples, SCALE_PER_SAMPLE, CONTIGUOUS)
    factor *= tl.load(inv + group, lane < lanes, other=0.0)
    own_tilt = tl.load(tilt + group, lane < lanes, other=0.0)
    own_offset = tl.load(offset + group, lane < lanes, other=0.0)
    g = passing(tl.load(grad + at, mask, other=0.0).to(ACC), y, at, mask, SLOPE)
    deviations = tl.load(x + at, mask, other=0.0).to(ACC) - centre[None, :]
    tl.store(x_grad + at, g * factor.to(ACC)[None, :] + (deviations * own_tilt[None, :] + own_offset[None, :]), mask)
