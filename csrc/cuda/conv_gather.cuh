// Convolution of M branches and its transpose, the input's gradient: sums over shifted source positions (axis.cuh) of
// batch-last memory [M][C][H][W][N], in float on the ordinary arithmetic units, whatever the storage type.
//
// A block owns one tile of target channels of one group of one branch, one class of targets and kThreads units. A unit
// is a thread's: a rectangle of targets times one vector of samples. Units count samples first, so that the lanes of a
// warp read neighbouring memory and none is idle, whatever N. All threads of a block multiply by the same weights,
// which come from shared memory.
#pragma once

#include "cuda/axis.cuh"
#include "cuda/conv_around.cuh"
#include "cuda/device.cuh"
#include "cuda/reduce.cuh"

namespace bsfast {

template <class T>
struct GatherArguments {
  const T* source;  // [M or 1, groups * sources, H, W, N]
  const T* weight;  // [M, groups * C_out, C_in, kH, kW]
  T* target;        // [M, groups * targets, H, W, N]
  Axis rows, columns;
  int groups, sources, targets;  // channels of one group
  int samples;
  bool shared_source;  // one source for all branches
  Normalise normalise;
  Epilogue<T> epilogue;
  float* statistics;  // [M, groups * targets, parts, 3]: count, mean, squared deviations of what is stored; or null
  int parts;          // blocks of units of one class
};

// Compile-time sizes. A `Kernel` of 3 is a 3x3 kernel read without gaps at every target: the thread loads all that its
// rectangle needs of a channel once. A `Kernel` of 1 goes tap by tap, and fits every kernel, stride and dilation.
template <int Height_, int Width_, int Channels_, int Samples_, int Kernel_>
struct GatherTile {
  static constexpr int Height = Height_, Width = Width_;  // targets
  static constexpr int Channels = Channels_;              // target channels
  static constexpr int Samples = Samples_;                // of a vector
  static constexpr int Kernel = Kernel_;
  static constexpr int Chunk = Kernel == 1 ? 128 : 16;        // steps whose weights are in shared memory at a time
  static constexpr int Weights = Kernel * Kernel * Channels;  // of a step
  static constexpr int SharedFloats = Chunk * (Weights + 2);
  static_assert(SharedFloats >= kWarps * Channels, "the reductions use this memory, too");
};

// Where a block is.
template <class Tile>
struct GatherBlock {
  int branch, group, first_target, part, row_class, column_class;

  template <class T>
  BSFAST_DEVICE explicit GatherBlock(const GatherArguments<T>& a) {
    // Blocks that read the same source are neighbours.
    const unsigned tiles = unsigned(a.targets + Tile::Channels - 1) / Tile::Channels;
    unsigned rest = blockIdx.x;
    const auto next = [&rest](unsigned count) {
      const unsigned index = rest % count;
      rest /= count;
      return int(index);
    };
    first_target = next(tiles) * Tile::Channels;
    part = next(unsigned(a.parts));
    column_class = next(unsigned(a.columns.classes()));
    row_class = next(unsigned(a.rows.classes()));
    group = next(unsigned(a.groups));
    branch = int(rest);
  }
};

// One step's multiply-adds: a window of one source channel times the weights of its taps.
template <class Tile, int WindowHeight, int WindowWidth>
BSFAST_DEVICE void multiply(const float (&window)[WindowHeight][WindowWidth][Tile::Samples], const float* weights,
                            float (&sum)[Tile::Height][Tile::Width][Tile::Channels][Tile::Samples]) {
#pragma unroll
  for (int i = 0; i < Tile::Kernel; ++i)
#pragma unroll
    for (int j = 0; j < Tile::Kernel; ++j) {
      float weight[Tile::Channels];
      constexpr int Wide = Tile::Channels % 4 == 0 ? 4 : 2;
#pragma unroll
      for (int o = 0; o < Tile::Channels; o += Wide) {
        float some[Wide];
        load(weights + (i * Tile::Kernel + j) * Tile::Channels + o, some);
#pragma unroll
        for (int k = 0; k < Wide; ++k) weight[o + k] = some[k];
      }
#pragma unroll
      for (int h = 0; h < Tile::Height; ++h)
#pragma unroll
        for (int w = 0; w < Tile::Width; ++w)
#pragma unroll
          for (int o = 0; o < Tile::Channels; ++o)
#pragma unroll
            for (int n = 0; n < Tile::Samples; ++n) sum[h][w][o][n] += window[h + i][w + j][n] * weight[o];
    }
}

// What a thread reads of one source channel: a pixel for each of its targets, or all that its targets' taps meet.
template <class Tile>
struct SourceWindow {
  static constexpr int Height = Tile::Height + Tile::Kernel - 1, Width = Tile::Width + Tile::Kernel - 1;
  static constexpr bool Dense = Tile::Kernel > 1;  // its rows and columns are neighbours in the source

  // One bit for each pixel, row by row: whether it is inside the image.
  template <class T>
  static BSFAST_DEVICE unsigned inside(const GatherArguments<T>& a, int row, int column) {
    unsigned columns = 0, bits = 0;
#pragma unroll
    for (int w = 0; w < Width; ++w)
      if (unsigned(column + w * (Dense ? 1 : a.columns.step())) < unsigned(a.columns.source)) columns |= 1u << w;
#pragma unroll
    for (int h = 0; h < Height; ++h)
      if (unsigned(row + h * (Dense ? 1 : a.rows.step())) < unsigned(a.rows.source)) bits |= columns << h * Width;
    return bits;
  }

  template <class T>
  static BSFAST_DEVICE void load(const GatherArguments<T>& a, const T* from, unsigned inside,
                                 float (&window)[Height][Width][Tile::Samples]) {
    const int across = (Dense ? 1 : a.columns.step()) * a.samples;
    const int down = (Dense ? 1 : a.rows.step()) * a.columns.source * a.samples;
#pragma unroll
    for (int h = 0; h < Height; ++h, from += down)
#pragma unroll
      for (int w = 0; w < Width; ++w) {
        Vector<T, Tile::Samples> vector = {};
        if (inside >> (h * Width + w) & 1)
          vector = *reinterpret_cast<const Vector<T, Tile::Samples>*>(from + w * across);
#pragma unroll
        for (int v = 0; v < Tile::Samples; ++v) window[h][w][v] = to_float(vector.of[v]);
      }
  }

  static BSFAST_DEVICE void normalise(const Normalise& normalise, float scale, float shift, unsigned inside,
                                      float (&window)[Height][Width][Tile::Samples]) {
#pragma unroll
    for (int h = 0; h < Height; ++h)
#pragma unroll
      for (int w = 0; w < Width; ++w)
#pragma unroll
        for (int v = 0; v < Tile::Samples; ++v) {
          const float value = normalise(window[h][w][v], scale, shift);  // a branch around it would cost registers
          window[h][w][v] = inside >> (h * Width + w) & 1 ? value : 0.0f;
        }
  }
};

// Copies the weights of the steps [first, first + count), and scale and shift of their channels, to shared memory as
// [step][tap][target channel]; those of missing channels are zero.
template <class Tile, class T>
BSFAST_DEVICE void stage(const GatherArguments<T>& a, const GatherBlock<Tile>& block, const Taps& rows,
                         const Taps& columns, int first, int count, float* weights, float* normalise) {
  constexpr int K = Tile::Kernel;
  const bool transposed = a.rows.transposed;
  const int taps = a.rows.kernel * a.columns.kernel, in_channels = transposed ? a.targets : a.sources;
  const int64 source_stride = transposed ? int64(in_channels) * taps : taps;
  const int64 target_stride = transposed ? taps : int64(in_channels) * taps;
  const int64 group = int64(block.branch) * a.groups + block.group;
  const T* from = a.weight + group * a.sources * a.targets * taps;
  const int blocks = rows.count / K * (columns.count / K);  // of taps: steps of one channel
#pragma unroll 1  // the divisions of several rounds at once would take the most registers of the kernel
  for (int at = int(threadIdx.x); at < count * Tile::Weights; at += kThreads) {
    const int o = block.first_target + at % Tile::Channels, tap = at / Tile::Channels % (K * K);
    const int step = first + at / Tile::Weights, c = step / blocks, k = step % blocks;
    const int i = k / (columns.count / K) * K + tap / K, j = k % (columns.count / K) * K + tap % K;
    const int row = rows.first + i * rows.kernel_step, column = columns.first + j * columns.kernel_step;
    weights[at] =
        o < a.targets ? to_float(from[c * source_stride + o * target_stride + row * a.columns.kernel + column]) : 0.0f;
  }
  if (a.normalise.scale == nullptr) return;
  const int64 channel = (a.shared_source ? block.group : group) * a.sources;
#pragma unroll 1
  for (int at = int(threadIdx.x); at < count; at += kThreads) {
    normalise[at * 2] = a.normalise.scale[channel + (first + at) / blocks];
    normalise[at * 2 + 1] = a.normalise.shift[channel + (first + at) / blocks];
  }
}

// Count, mean and sum of squared deviations of a block's part of each target channel, of the numbers as stored.
template <class Tile, class T>
BSFAST_DEVICE void write_statistics(const GatherArguments<T>& a, const GatherBlock<Tile>& block,
                                    const float (&stored)[Tile::Height][Tile::Width][Tile::Channels][Tile::Samples],
                                    int height, int width, float* shared) {
  float count[1] = {float(height * width * Tile::Samples)}, mean[Tile::Channels], squares[Tile::Channels];
#pragma unroll
  for (int o = 0; o < Tile::Channels; ++o) {
    mean[o] = squares[o] = 0;
#pragma unroll
    for (int h = 0; h < Tile::Height; ++h)
#pragma unroll
      for (int w = 0; w < Tile::Width; ++w)
#pragma unroll
        for (int n = 0; n < Tile::Samples; ++n)
          if (h < height && w < width) mean[o] += stored[h][w][o][n];
  }
  __syncthreads();
  block_sums(count, shared);
  block_sums(mean, shared);
#pragma unroll
  for (int o = 0; o < Tile::Channels; ++o) {
    mean[o] /= count[0];
#pragma unroll
    for (int h = 0; h < Tile::Height; ++h)
#pragma unroll
      for (int w = 0; w < Tile::Width; ++w)
#pragma unroll
        for (int n = 0; n < Tile::Samples; ++n)
          if (h < height && w < width) squares[o] += (stored[h][w][o][n] - mean[o]) * (stored[h][w][o][n] - mean[o]);
  }
  block_sums(squares, shared);
  const int64 channel = (int64(block.branch) * a.groups + block.group) * a.targets + block.first_target;
#pragma unroll
  for (int o = 0; o < Tile::Channels; ++o)
    if (int(threadIdx.x) == o && block.first_target + o < a.targets) {
      float* to = a.statistics + ((channel + o) * a.parts + block.part) * 3;
      to[0] = count[0];
      to[1] = mean[o];
      to[2] = squares[o];
    }
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kResident) conv_gather(const GatherArguments<T> a) {
  constexpr int K = Tile::Kernel, V = Tile::Samples;
  float* weights = shared_memory<float>();
  float* normalise = weights + Tile::Chunk * Tile::Weights;
  const GatherBlock<Tile> block(a);
  const Taps rows = taps_of(a.rows, block.row_class), columns = taps_of(a.columns, block.column_class);
  const int class_rows = a.rows.targets(block.row_class), class_columns = a.columns.targets(block.column_class);

  // This thread's unit: its first target within the class, and its samples.
  const int vectors = a.samples / V, across = (class_columns + Tile::Width - 1) / Tile::Width;
  const int unit = block.part * kThreads + int(threadIdx.x);
  const int n = unit % vectors * V, q_column = unit / vectors % (across > 0 ? across : 1) * Tile::Width;
  const int q_row = unit / vectors / (across > 0 ? across : 1) * Tile::Height;
  const int height = across == 0 || q_row >= class_rows ? 0 : min(Tile::Height, class_rows - q_row);
  const int width = min(Tile::Width, class_columns - q_column);

  const int64 source_plane = int64(a.rows.source) * a.columns.source * a.samples;
  const T* source =
      a.source + (int64(a.shared_source ? 0 : block.branch) * a.groups + block.group) * a.sources * source_plane;
  float sum[Tile::Height][Tile::Width][Tile::Channels][V] = {};
  const int blocks = rows.count / K * (columns.count / K), steps = a.sources * blocks;
  const int low_row = q_row * a.rows.step() + rows.low, low_column = q_column * a.columns.step() + columns.low;
  using Window = SourceWindow<Tile>;
  unsigned inside = Window::inside(a, low_row, low_column);
  int c = 0, i = 0, j = 0;  // channel and taps of the step
  for (int first = 0; first < steps; first += Tile::Chunk) {
    const int count = min(Tile::Chunk, steps - first);
    __syncthreads();
    stage<Tile>(a, block, rows, columns, first, count, weights, normalise);
    __syncthreads();
    if (height == 0) continue;
    for (int s = 0; s < count; ++s) {
      float window[Window::Height][Window::Width][V];
      if (K == 1) inside = Window::inside(a, low_row + i * rows.offset_step, low_column + j * columns.offset_step);
      const int64 row = low_row + (K == 1 ? i * rows.offset_step : 0);
      const T* from = source + c * source_plane + (row * a.columns.source + low_column) * a.samples + n;
      if (K == 1) from += j * columns.offset_step * a.samples;
      Window::load(a, from, inside, window);
      if (a.normalise.scale != nullptr)
        Window::normalise(a.normalise, normalise[s * 2], normalise[s * 2 + 1], inside, window);
      multiply<Tile>(window, weights + s * Tile::Weights, sum);
      if (K != 1) {
        ++c;
      } else if (++j == columns.count) {
        j = 0;
        if (++i == rows.count) {
          i = 0;
          ++c;
        }
      }
    }
  }

  const int64 target_plane = int64(a.rows.target) * a.columns.target * a.samples;
  const int64 channel = (int64(block.branch) * a.groups + block.group) * a.targets + block.first_target;
#pragma unroll
  for (int o = 0; o < Tile::Channels; ++o) {
    if (block.first_target + o >= a.targets) continue;
#pragma unroll
    for (int h = 0; h < Tile::Height; ++h)
#pragma unroll
      for (int w = 0; w < Tile::Width; ++w) {
        if (h >= height || w >= width) continue;
        const int y = (q_row + h) * a.rows.classes() + block.row_class;
        const int x = (q_column + w) * a.columns.classes() + block.column_class;
        const int64 at = (channel + o) * target_plane + (y * a.columns.target + x) * a.samples + n;
        a.epilogue.finish(sum[h][w][o], channel + o, at);
        store(sum[h][w][o], a.target + at);
      }
  }
  if (a.statistics != nullptr) write_statistics<Tile>(a, block, sum, height, width, weights);
}

}  // namespace bsfast
