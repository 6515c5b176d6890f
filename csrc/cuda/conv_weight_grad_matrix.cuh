// The sums of conv_weight_grad.cuh for 16-bit storage on the matrix units of sm_80 and later: 16 rows, that is pairs
// (input channel, tap), x 8 output channels are the result of one instruction, and 16 samples of one position what it
// sums over. Samples lie side by side in both operands, so that neither is transposed.
//
// A block owns some rows x a tile of output channels of one group of one branch, and a part of the windows: Height x
// Width positions of 32 samples, whose input and output gradient lie in shared memory, one row of samples for each
// (channel, pixel); a tap is another row. Warps share out the block's rows, and where these are few the positions, too.
#pragma once

#include "cuda/conv_weight_grad.cuh"
#include "cuda/matrix.cuh"

namespace bsfast {

template <int ChannelTiles_>
struct MatrixGradTile {
  static constexpr int ChannelTiles = ChannelTiles_;  // of one instruction
  static constexpr int Channels = 8 * ChannelTiles;
  static constexpr int RowTiles = 4;  // of a warp
  static constexpr int WarpRows = 16 * RowTiles;
  static constexpr int WarpSums = WarpRows * Channels;
  static constexpr int Samples = 32;
  static constexpr int Pieces = Samples / 8;              // of 16 bytes, of a row in shared memory
  static constexpr int Batch = ChannelTiles > 3 ? 2 : 4;  // pieces that a thread has in flight; the sums need registers
};

// What of one axis of the input a window reads: positions `unit` apart, which divides both distances.
struct GradWindowAxis {
  int targets, sources;        // positions of the output, and of the input
  int unit, stride, dilation;  // the distances in units
};

// Rows in shared memory from a channel to the next: an odd number, so that 8 channels of one position lie in different
// banks.
__host__ __device__ inline int grad_channel_rows(int rows, int columns) { return rows * columns | 1; }

struct GradWindow {
  GradWindowAxis rows, columns;
  int input_channels;   // at most, of the block's rows
  int output_channels;  // at most, of the block
  int block_rows;
  int row_warps;  // side by side over the rows; the others share their positions

  __host__ __device__ int input_rows() const {
    return input_channels * grad_channel_rows(rows.sources, columns.sources);
  }
  __host__ __device__ int output_rows() const {
    return output_channels * grad_channel_rows(rows.targets, columns.targets);
  }

  template <class Tile>
  __host__ __device__ int shared_bytes() const {
    const int staged = (input_rows() + output_rows()) * Tile::Samples * 2;
    const int sums = row_warps < kWarps ? row_warps * Tile::WarpSums * int(sizeof(float)) : 0;
    return staged > sums ? staged : sums;
  }
};

template <class T>
struct MatrixWeightGradArguments {
  WeightGradArguments<T> grad;
  GradWindow window;
};

// 8 samples of a row in shared memory. Pieces are stored in an order that depends on the row, so that one piece of 8
// rows that lie an odd number apart is in different banks.
template <class Tile, class T>
BSFAST_DEVICE T* grad_piece(T* rows, int row, int piece) {
  return rows + row * Tile::Samples + (piece ^ (row >> 1 & (Tile::Pieces - 1))) * 8;
}

// Some channels of an image, of which positions some distance apart are copied to shared memory.
template <class T>
struct Panel {
  const T* from;  // the first channel's first sample
  int channels;
  int height, width, samples;  // of the image
  int rows, columns;           // positions
  int row_unit, column_unit;   // from one to the next
};

// Copies a panel whose first position is (low_row, low_column) to shared memory as [channel][position][sample], with an
// odd number of rows for each channel; zero outside the image and beyond the samples. Each thread keeps several loads
// in flight.
template <class Tile, class T>
BSFAST_DEVICE void stage_panel(const Panel<T>& panel, const Normalise& normalise, int low_row, int low_column,
                               int first_sample, T* to) {
  constexpr int kBatch = Tile::Batch, kStep = kThreads / Tile::Pieces;
  const int piece = int(threadIdx.x) % Tile::Pieces, sample = first_sample + piece * 8;
  const int64 plane = int64(panel.height) * panel.width * panel.samples;
  const int count = panel.channels * panel.rows * panel.columns;
  const int channel_rows = grad_channel_rows(panel.rows, panel.columns);
  Counter at(int(threadIdx.x) / Tile::Pieces, kStep, panel.columns, panel.rows);
#pragma unroll 1
  for (int row = int(threadIdx.x) / Tile::Pieces; row < count; row += kBatch * kStep) {
    Vector<T, 8> values[kBatch];
    int channel[kBatch], place[kBatch];  // -1: zeros; rows in shared memory
#pragma unroll
    for (int b = 0; b < kBatch; ++b, at.next()) {
      values[b] = {};
      channel[b] = -1;
      place[b] = at.outer * channel_rows + at.middle * panel.columns + at.inner;
      const int y = low_row + at.middle * panel.row_unit, x = low_column + at.inner * panel.column_unit;
      if (at.outer < panel.channels && unsigned(y) < unsigned(panel.height) && unsigned(x) < unsigned(panel.width) &&
          sample < panel.samples) {
        channel[b] = at.outer;
        const T* from = panel.from + at.outer * plane + (y * panel.width + x) * panel.samples + sample;
        values[b] = *reinterpret_cast<const Vector<T, 8>*>(from);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (normalise.scale != nullptr && channel[b] >= 0) {
        const float scale = normalise.scale[channel[b]], shift = normalise.shift[channel[b]];
#pragma unroll
        for (int i = 0; i < 8; ++i) from_float(normalise(to_float(values[b].of[i]), scale, shift), values[b].of[i]);
      }
      if (row + b * kStep < count) *reinterpret_cast<Vector<T, 8>*>(grad_piece<Tile>(to, place[b], piece)) = values[b];
    }
  }
}

// Adds up the sums of warps that share rows, in their order. True for the warp that has got the result.
template <class Tile>
BSFAST_DEVICE bool add_up_warps(float (&sum)[Tile::RowTiles][Tile::ChannelTiles][4], int row_warps, float* shared) {
  const int lane = int(threadIdx.x % kLanes), warp = int(threadIdx.x / kLanes);
  const int turn = warp / row_warps, turns = kWarps / row_warps;
  float* const own = shared + warp % row_warps * Tile::WarpSums + lane;
  for (int t = 1; t < turns; ++t) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < Tile::RowTiles; ++r)
#pragma unroll
      for (int o = 0; o < Tile::ChannelTiles; ++o)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& place = own[((r * Tile::ChannelTiles + o) * 4 + i) * int(kLanes)];
          if (turn == t - 1) place = sum[r][o][i];
        }
    __syncthreads();
    if (turn != t) continue;
#pragma unroll
    for (int r = 0; r < Tile::RowTiles; ++r)
#pragma unroll
      for (int o = 0; o < Tile::ChannelTiles; ++o)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r][o][i] += own[((r * Tile::ChannelTiles + o) * 4 + i) * int(kLanes)];
  }
  return turn == turns - 1;
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kResident)
    conv_weight_grad_matrix(const MatrixWeightGradArguments<T> arguments) {
  const WeightGradArguments<T>& a = arguments.grad;
  const GradWindow& window = arguments.window;
  const int taps = a.rows.kernel * a.columns.kernel, all_rows = a.in_channels * taps;
  unsigned rest = blockIdx.x;
  const auto next = [&rest](int count) {
    const unsigned index = rest % unsigned(count);
    rest /= unsigned(count);
    return int(index);
  };
  // Blocks that read the same samples are neighbours.
  const int first_row = next((all_rows + window.block_rows - 1) / window.block_rows) * window.block_rows;
  const int first_channel = next((a.out_channels + Tile::Channels - 1) / Tile::Channels) * Tile::Channels;
  const int part = next(a.parts), group = next(a.groups), branch = int(rest);
  const int last_row = min(first_row + window.block_rows, all_rows), first_input = first_row / taps;

  const int64 in_group = int64(a.shared_input ? 0 : branch) * a.groups + group;
  const int64 input = in_group * a.in_channels + first_input;
  const int64 channel = (int64(branch) * a.groups + group) * a.out_channels + first_channel;
  const int64 x_plane = int64(a.rows.source) * a.columns.source * a.samples;
  const int64 grad_plane = int64(a.rows.target) * a.columns.target * a.samples;
  const Panel<T> x{a.x + input * x_plane,
                   (last_row - 1) / taps + 1 - first_input,
                   a.rows.source,
                   a.columns.source,
                   a.samples,
                   window.rows.sources,
                   window.columns.sources,
                   window.rows.unit,
                   window.columns.unit};
  const Panel<T> grad{a.grad + channel * grad_plane,
                      min(Tile::Channels, a.out_channels - first_channel),
                      a.rows.target,
                      a.columns.target,
                      a.samples,
                      window.rows.targets,
                      window.columns.targets,
                      1,
                      1};
  Normalise normalise = a.normalise;
  if (normalise.scale != nullptr) {
    normalise.scale += input;
    normalise.shift += input;
  }
  T* const x_rows = shared_memory<T>();
  T* const grad_rows = x_rows + window.input_rows() * Tile::Samples;

  // Matrices 0 to 3 of an instruction's first factor: rows 0-7 or 8-15 (lane / 8), samples 0-7 or 8-15 (lane / 16); of
  // its second, of two tiles at once: samples 0-7 or 8-15 (lane / 8), channels of either (lane / 16).
  const int lane = int(threadIdx.x % kLanes), warp = int(threadIdx.x / kLanes);
  const int warp_row = warp % window.row_warps * Tile::WarpRows;
  int x_row[Tile::RowTiles], grad_row[(Tile::ChannelTiles + 1) / 2];
#pragma unroll
  for (int r = 0; r < Tile::RowTiles; ++r) {
    // Rows beyond the last repeat it; their sums are not stored.
    const int k = min(first_row + warp_row + r * 16 + lane % 16, last_row - 1);
    const int c = k / taps - first_input, i = k % taps / a.columns.kernel, j = k % a.columns.kernel;
    x_row[r] =
        c * grad_channel_rows(x.rows, x.columns) + i * window.rows.dilation * x.columns + j * window.columns.dilation;
  }
#pragma unroll
  for (int o = 0; o < (Tile::ChannelTiles + 1) / 2; ++o)
    grad_row[o] =
        min(o * 16 + lane / 16 * 8 + lane % 8, grad.channels - 1) * grad_channel_rows(grad.rows, grad.columns);

  const int sample_tiles = (a.samples + Tile::Samples - 1) / Tile::Samples;
  const int across = (a.columns.target + grad.columns - 1) / grad.columns;
  const int down = (a.rows.target + grad.rows - 1) / grad.rows;
  const int64 windows = int64(sample_tiles) * across * down;
  const int begin = int(windows * part / a.parts), end = int(windows * (part + 1) / a.parts);
  float sum[Tile::RowTiles][Tile::ChannelTiles][4] = {};
  for (int at = begin; at < end; ++at) {
    const int first_sample = at % sample_tiles * Tile::Samples;
    const int column = at / sample_tiles % across * grad.columns, row = at / sample_tiles / across * grad.rows;
    __syncthreads();
    stage_panel<Tile>(x, normalise, row * a.rows.stride - a.rows.padding, column * a.columns.stride - a.columns.padding,
                      first_sample, x_rows);
    stage_panel<Tile>(grad, {nullptr, nullptr, false}, row, column, first_sample, grad_rows);
    __syncthreads();
    const int height = min(grad.rows, a.rows.target - row), width = min(grad.columns, a.columns.target - column);
    Counter pixel(warp / window.row_warps, kWarps / window.row_warps, grad.columns, grad.rows);
    for (; pixel.outer == 0 && pixel.middle < height; pixel.next()) {
      if (pixel.inner >= width) continue;  // its gradient is zero, but zero times infinity is not
      const int x_pixel = pixel.middle * window.rows.stride * x.columns + pixel.inner * window.columns.stride;
      const int grad_pixel = pixel.middle * grad.columns + pixel.inner;
#pragma unroll
      for (int k = 0; k < Tile::Pieces; k += 2) {
        unsigned right[(Tile::ChannelTiles + 1) / 2][4];
#pragma unroll
        for (int o = 0; o < (Tile::ChannelTiles + 1) / 2; ++o)
          load_matrices(right[o], grad_piece<Tile>(grad_rows, grad_row[o] + grad_pixel, k + lane / 8 % 2));
#pragma unroll
        for (int r = 0; r < Tile::RowTiles; ++r) {
          unsigned left[4];
          load_matrices(left, grad_piece<Tile>(x_rows, x_row[r] + x_pixel, k + lane / 16));
#pragma unroll
          for (int o = 0; o < Tile::ChannelTiles; ++o)
            multiply_matrices(T{}, sum[r][o], left, {right[o / 2][o % 2 * 2], right[o / 2][o % 2 * 2 + 1]});
        }
      }
    }
  }

  if (!add_up_warps<Tile>(sum, window.row_warps, shared_memory<float>())) return;
  const int64 weights = int64(a.groups) * a.out_channels * all_rows;  // of a branch
  float* const to = a.partial + (int64(part) * a.branches + branch) * weights +
                    (int64(group) * a.out_channels + first_channel) * all_rows;
#pragma unroll
  for (int r = 0; r < Tile::RowTiles; ++r)
#pragma unroll
    for (int o = 0; o < Tile::ChannelTiles; ++o)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = first_row + warp_row + r * 16 + i / 2 * 8 + lane / 4, own = o * 8 + lane % 4 * 2 + i % 2;
        if (k < last_row && own < grad.channels) to[own * int64(all_rows) + k] = sum[r][o][i];
      }
}

}  // namespace bsfast
