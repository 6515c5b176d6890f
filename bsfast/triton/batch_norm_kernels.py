"""Batch normalisation with the statistics of the batch, a residual and a ReLU: the kernels.

A channel of a branch, the unit, is ``repeats`` rows of ``length`` elements, ``channels`` rows apart. On batch-last
memory it is one row of H W N elements, on contiguous memory N rows of H W. It is cut into tiles, each of a program: a
network has too few channels to fill a GPU with one each.
"""

import triton
import triton.language as tl

from bsfast.triton.moments import merge_moments, merge_sums, moments

UNSPECIALISED = ("repeats", "channels", "across", "tiles")  # one kernel for all; of a length, alignment tells


@triton.jit
def locate(repeats, channels, length, across, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The unit of this program, offsets and mask of its tile, and how many elements that has."""
    unit = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = (tile // across).to(tl.int64) * ROWS
    column = (tile % across).to(tl.int64) * COLUMNS
    first = (unit // channels).to(tl.int64) * repeats * channels + unit % channels
    rows = tl.minimum(repeats - row, ROWS).to(tl.int32)
    columns = tl.minimum(length - column, COLUMNS).to(tl.int32)
    down = tl.arange(0, ROWS)[:, None]
    right = tl.arange(0, COLUMNS)[None, :]
    at = (first + row * channels) * length + column + down * (channels.to(tl.int64) * length) + right
    return unit, at, (down < rows) & (right < columns), rows * columns


@triton.jit
def passing(grad, y, x, scale, shift, at, mask):
    """The gradient behind the ReLU: where y, or what x becomes, is positive, or not a number, as the ReLU keeps it."""
    result = tl.fma(x, scale, shift) if y is None else tl.load(y + at, mask, other=0.0).to(x.dtype)
    return tl.where(result <= 0, 0.0, grad)


@triton.jit(do_not_specialize=UNSPECIALISED)
def tile_moments(
    x,  # activation
    partial,  # [3, unit, tile]: count, mean, squared deviations
    repeats,
    channels,
    length,
    across,
    tiles,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Moments of each tile; a program owns a tile."""
    _, at, mask, count = locate(repeats, channels, length, across, tiles, ROWS, COLUMNS)
    mean, squares = moments(tl.load(x + at, mask, other=0.0).to(ACC), mask, count, None)
    to = partial + tl.program_id(0)
    plane = tl.num_programs(0).to(tl.int64)
    tl.store(to, count.to(tl.float64))
    tl.store(to + plane, mean)
    tl.store(to + 2 * plane, squares)


@triton.jit(do_not_specialize=["tiles"])
def coefficients(
    partial,  # as above, or None: mean and variance are given
    weight,  # [unit] or None
    bias,  # [unit] or None
    mean,  # [unit], as all that follow
    variance,
    scale,
    shift,
    inv,
    tiles,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of each unit and y = scale x + shift; a program owns a unit."""
    unit = tl.program_id(0) + tl.arange(0, 1)
    if partial is None:
        own_mean = tl.load(mean + unit).to(tl.float64)
        own_variance = tl.load(variance + unit).to(tl.float64)
    else:
        plane = tl.num_programs(0).to(tl.int64) * tiles
        first = tl.program_id(0).to(tl.int64) * tiles
        own_mean, own_variance = merge_moments(partial, plane, first, tiles, 1, tl.arange(0, 1), BLOCK, 1)
        tl.store(mean + unit, own_mean)
        tl.store(variance + unit, own_variance)
    own_inv = 1 / tl.sqrt(own_variance + tl.full(own_variance.shape, EPS, tl.float64))
    own_scale = own_inv
    if weight is not None:
        own_scale = own_inv * tl.load(weight + unit).to(tl.float64)
    own_shift = -own_mean * own_scale
    if bias is not None:
        own_shift += tl.load(bias + unit).to(tl.float64)
    tl.store(inv + unit, own_inv)
    tl.store(scale + unit, own_scale)
    tl.store(shift + unit, own_shift)


@triton.jit(do_not_specialize=UNSPECIALISED)
def normalise(
    x,  # activation, as y and residual
    residual,  # or None
    y,
    scale,  # [unit]
    shift,  # [unit]
    repeats,
    channels,
    length,
    across,
    tiles,
    ACC: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The result act(scale x + shift + residual); a program owns a tile."""
    unit, at, mask, _ = locate(repeats, channels, length, across, tiles, ROWS, COLUMNS)
    values = tl.load(x + at, mask, other=0.0).to(ACC)
    values = tl.fma(values, tl.load(scale + unit), tl.load(shift + unit))
    if residual is not None:
        values += tl.load(residual + at, mask, other=0.0).to(ACC)
    if RELU:
        values = tl.where(values <= 0, 0.0, values)
    tl.store(y + at, values.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def tile_gradients(
    x,  # activation, as grad, y and residual_grad
    y,  # or None: computed again
    grad,
    mean,  # [unit], as scale and shift
    scale,
    shift,
    residual_grad,  # or None
    partial,  # [2, unit, tile]: sums of g and of g (x - mean)
    repeats,
    channels,
    length,
    across,
    tiles,
    ACC: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient g behind the ReLU, which is the residual's, and its sums over each tile; a program owns a tile."""
    unit, at, mask, _ = locate(repeats, channels, length, across, tiles, ROWS, COLUMNS)
    values = tl.load(x + at, mask, other=0.0).to(ACC)
    g = tl.load(grad + at, mask, other=0.0).to(ACC)
    if RELU:
        g = passing(g, y, values, tl.load(scale + unit), tl.load(shift + unit), at, mask)
    if residual_grad is not None:
        tl.store(residual_grad + at, g.to(residual_grad.dtype.element_ty), mask)
    to = partial + tl.program_id(0)
    tl.store(to, tl.sum(g))
    tl.store(to + tl.num_programs(0).to(tl.int64), tl.sum(g * (values - tl.load(mean + unit))))


@triton.jit(do_not_specialize=["tiles", "count"])
def gradient_coefficients(
    partial,  # as above
    scale,  # [unit], as all that follow
    inv,
    weight_grad,
    bias_grad,
    slope,
    offset,
    count,
    tiles,
    BLOCK: tl.constexpr,
):
    """Gradients of weight and bias, and x_grad = scale g + slope (x - mean) + offset; a program owns a unit."""
    unit = tl.program_id(0) + tl.arange(0, 1)
    first = partial + tl.program_id(0).to(tl.int64) * tiles
    second = first + tl.num_programs(0).to(tl.int64) * tiles
    total = merge_sums(first, tiles, 1, 1, tl.arange(0, 1), 1, BLOCK, 1)
    product = merge_sums(second, tiles, 1, 1, tl.arange(0, 1), 1, BLOCK, 1)
    own_inv = tl.load(inv + unit).to(tl.float64)
    share = tl.load(scale + unit).to(tl.float64) / count
    tl.store(bias_grad + unit, total)
    tl.store(weight_grad + unit, product * own_inv)
    tl.store(slope + unit, -share * own_inv * own_inv * product)
    tl.store(offset + unit, -share * total)


@triton.jit(do_not_specialize=UNSPECIALISED)
def input_gradient(
    x,  # activation, as y, grad and x_grad
    y,  # or None: computed again
    grad,
    mean,  # [unit], as scale, shift, slope and offset
    scale,
    shift,
    slope,
    offset,
    x_grad,  # may be grad
    repeats,
    channels,
    length,
    across,
    tiles,
    ACC: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of x; a program owns a tile."""
    unit, at, mask, _ = locate(repeats, channels, length, across, tiles, ROWS, COLUMNS)
    values = tl.load(x + at, mask, other=0.0).to(ACC)
    own_scale = tl.load(scale + unit)
    g = tl.load(grad + at, mask, other=0.0).to(ACC)
    if RELU:
        g = passing(g, y, values, own_scale, tl.load(shift + unit), at, mask)
    rest = tl.fma(values - tl.load(mean + unit), tl.load(slope + unit), tl.load(offset + unit))
    tl.store(x_grad + at, tl.fma(g, own_scale, rest).to(x_grad.dtype.element_ty), mask)
