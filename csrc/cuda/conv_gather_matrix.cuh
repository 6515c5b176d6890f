// The sums of conv_gather.cuh for 16-bit storage on the matrix units of sm_80 and later, or of sm_70: what they sum
// over are pairs (source channel, tap). The pairs are numbered through, so that narrow branches waste little: of 64
// pairs, which are 4 steps of sm_80, 6 channels x 9 taps fill 54.
//
// A block owns Height x Width targets of one class, 64 samples and one tile of target channels of one group; a warp
// owns 16 of the samples. The source that the block needs of some channels lies in shared memory as one row of 64
// samples for each pixel, and a table says where each pair's row is, for every kernel, stride and dilation alike.
#pragma once

#include "cuda/conv_gather.cuh"
#include "cuda/matrix.cuh"

namespace bsfast {

template <int ChannelTiles_, class Units_>
struct MatrixTile {
  using Units = Units_;                        // Sm80 or Sm70
  static constexpr int Height = 2, Width = 4;  // targets
  static constexpr int Pixels = Height * Width;
  static constexpr int ChannelTiles = ChannelTiles_;  // of one step
  static constexpr int Channels = 8 * ChannelTiles;
  static constexpr int Samples = 16 * kWarps;  // of a block
  static constexpr int Pieces = Samples / 8;   // of 16 bytes, of a row in shared memory
  // Pairs in shared memory: a multiple, and more, which keep the lanes' loads of weights in different banks.
  static constexpr int DepthUnit = 16, WeightPadding = 8;
  static constexpr int OutputRows = Pixels * Channels;  // the results pass through the same memory
};

// Sizes in shared memory: pixels of a channel's window, channels and pairs at a time.
struct MatrixWindow {
  int height, width, chunk, depth;

  __host__ __device__ int rows() const { return height * width * chunk + 1; }  // the last holds zeros

  template <class Tile>
  __host__ __device__ int shared_bytes() const {
    const int used = rows() > Tile::OutputRows ? rows() : Tile::OutputRows;
    return used * Tile::Samples * 2 + Tile::Channels * (depth + Tile::WeightPadding) * 2 + depth * int(sizeof(int));
  }
};

// What a lane sums up.
template <class Tile>
struct MatrixSums {
  typename Tile::Units::Sums of[Tile::Height][Tile::Units::Targets][Tile::ChannelTiles];
};

template <class T>
struct MatrixGatherArguments {
  GatherArguments<T> gather;
  MatrixWindow window;
};

// A piece of a row: 8 samples. Pieces are stored in an order that depends on the row, so that 8 rows of one piece lie
// in different banks.
template <class Tile, class T>
BSFAST_DEVICE T* piece_of(T* rows, int row, int piece) {
  return rows + row * Tile::Samples + (piece ^ (row & (Tile::Pieces - 1))) * 8;
}

// Copies the source of channels [first, first + count) to shared memory; zero outside the image and beyond the samples.
template <class Tile, class T>
BSFAST_DEVICE void stage_source(const GatherArguments<T>& a, const MatrixWindow& window, const GatherBlock<Tile>& block,
                                int low_row, int low_column, int first_sample, int first, int count, T* rows) {
  const int pixels = window.height * window.width;
  const int64 plane = int64(a.rows.source) * a.columns.source * a.samples;
  const int64 channel = (int64(a.shared_source ? 0 : block.branch) * a.groups + block.group) * a.sources + first;
#pragma unroll 1
  for (int at = int(threadIdx.x); at < count * pixels * Tile::Pieces; at += kThreads) {
    const int piece = at % Tile::Pieces, row = at / Tile::Pieces, c = row / pixels, pixel = row % pixels;
    const int y = low_row + pixel / window.width, x = low_column + pixel % window.width;
    const int sample = first_sample + piece * 8;
    Vector<T, 8> values = {};
    if (unsigned(y) < unsigned(a.rows.source) && unsigned(x) < unsigned(a.columns.source) && sample < a.samples) {
      const T* from = a.source + (channel + c) * plane + (int64(y) * a.columns.source + x) * a.samples + sample;
      values = *reinterpret_cast<const Vector<T, 8>*>(from);
      if (a.normalise.scale != nullptr) {
        const int64 of = (a.shared_source ? int64(block.group) * a.sources + first : channel) + c;
        const float scale = a.normalise.scale[of], shift = a.normalise.shift[of];
#pragma unroll
        for (int i = 0; i < 8; ++i) from_float(a.normalise(to_float(values.of[i]), scale, shift), values.of[i]);
      }
    }
    *reinterpret_cast<Vector<T, 8>*>(piece_of<Tile>(rows, row, piece)) = values;
  }
}

// Copies the weights of the same channels to shared memory as [target channel][pair], and writes each pair's row; pairs
// beyond the last multiply a row of zeros by zero.
template <class Tile, class T>
BSFAST_DEVICE void stage_pairs(const GatherArguments<T>& a, const MatrixWindow& window, const GatherBlock<Tile>& block,
                               const Taps& rows, const Taps& columns, int first, int pairs, int depth, T* weights,
                               int* table) {
  const bool transposed = a.rows.transposed;
  const int taps = a.rows.kernel * a.columns.kernel, in_channels = transposed ? a.targets : a.sources;
  const int64 source_stride = transposed ? int64(in_channels) * taps : taps;
  const int64 target_stride = transposed ? taps : int64(in_channels) * taps;
  const T* from = a.weight + (int64(block.branch) * a.groups + block.group) * a.sources * a.targets * taps;
  const int class_taps = rows.count * columns.count;
#pragma unroll 1
  for (int k = int(threadIdx.x); k < depth; k += kThreads) {
    const int c = k / class_taps, i = k % class_taps / columns.count, j = k % columns.count;
    table[k] = k < pairs ? (c * window.height + i * rows.offset_step) * window.width + j * columns.offset_step : -1;
    const int row = rows.first + i * rows.kernel_step, column = columns.first + j * columns.kernel_step;
    const T* weight = from + (first + c) * source_stride + row * a.columns.kernel + column;
    for (int o = 0; o < Tile::Channels; ++o) {
      T value = {};
      if (k < pairs && block.first_target + o < a.targets) value = weight[(block.first_target + o) * target_stride];
      weights[o * (window.depth + Tile::WeightPadding) + k] = value;
    }
  }
}

// Count, mean and squared deviations of each channel's results in shared memory. A warp owns a channel at a time.
template <class Tile, class T>
BSFAST_DEVICE void write_statistics(const GatherArguments<T>& a, const GatherBlock<Tile>& block, const T* results,
                                    int height, int width, int samples) {
  const int lane = int(threadIdx.x % kLanes), count = height * width * samples;
  for (int o = int(threadIdx.x / kLanes); o < Tile::Channels && block.first_target + o < a.targets; o += kWarps) {
    float mean = 0, squares = 0;
    for (int round = 0; round < 2; ++round) {
      float sum[1] = {0};
      for (int at = lane; at < count; at += int(kLanes)) {
        const int n = at % samples, p = at / samples / width * Tile::Width + at / samples % width;
        const float value = to_float(piece_of<Tile>(results, p * Tile::Channels + o, n / 8)[n % 8]);
        sum[0] += round == 0 ? value : (value - mean) * (value - mean);
      }
      squares = lane_sums(sum);
      if (round == 0) mean = squares / float(count);
    }
    if (lane != 0) continue;
    const int64 channel = (int64(block.branch) * a.groups + block.group) * a.targets + block.first_target + o;
    float* to = a.statistics + (channel * a.parts + block.part) * 3;
    to[0] = float(count);
    to[1] = mean;
    to[2] = squares;
  }
}

// Calls use(target, place) with the 16 bytes of the target that lie at each piece of the results in shared memory.
template <class Tile, class T, class Use>
BSFAST_DEVICE void each_piece(const GatherArguments<T>& a, const GatherBlock<Tile>& block, int q_row, int q_column,
                              int height, int width, int first_sample, T* rows, Use use) {
  const int64 plane = int64(a.rows.target) * a.columns.target * a.samples;
  const int64 channel = (int64(block.branch) * a.groups + block.group) * a.targets + block.first_target;
  for (int at = int(threadIdx.x); at < Tile::OutputRows * Tile::Pieces; at += kThreads) {
    const int piece = at % Tile::Pieces, row = at / Tile::Pieces, o = row % Tile::Channels, p = row / Tile::Channels;
    const int h = p / Tile::Width, w = p % Tile::Width, sample = first_sample + piece * 8;
    if (h >= height || w >= width || block.first_target + o >= a.targets || sample >= a.samples) continue;
    const int y = (q_row + h) * a.rows.classes() + block.row_class;
    const int x = (q_column + w) * a.columns.classes() + block.column_class;
    use((channel + o) * plane + (int64(y) * a.columns.target + x) * a.samples + sample,
        reinterpret_cast<Vector<T, 8>*>(piece_of<Tile>(rows, row, piece)));
  }
}

// Applies the epilogue and stores. The results pass through shared memory, so that loads and stores are of 16 bytes:
// the residual lies there first, where the results will.
template <class Tile, class T>
BSFAST_DEVICE void finish_results(const GatherArguments<T>& a, const GatherBlock<Tile>& block, int q_row, int q_column,
                                  int height, int width, int first_sample, const MatrixSums<Tile>& sums, T* rows) {
  using Units = typename Tile::Units;
  const Epilogue<T>& epilogue = a.epilogue;
  const int lane = int(threadIdx.x % kLanes), warp = int(threadIdx.x / kLanes);
  if (epilogue.residual != nullptr) {
    __syncthreads();
    each_piece<Tile>(a, block, q_row, q_column, height, width, first_sample, rows, [&](int64 at, Vector<T, 8>* piece) {
      *piece = *reinterpret_cast<const Vector<T, 8>*>(epilogue.residual + at);
    });
    __syncthreads();
  }
  const int64 first = (int64(block.branch) * a.groups + block.group) * a.targets + block.first_target;
  __syncwarp();  // a warp has read, and writes, its own samples only
#pragma unroll
  for (int o = 0; o < Tile::ChannelTiles; ++o)
#pragma unroll
    for (int j = 0; j < Units::Channels; ++j) {
      const int channel = o * 8 + Units::channel(lane, j), last = a.targets - block.first_target - 1;
      const float scale = epilogue.scale_of(first + min(channel, last));
      const float bias = epilogue.bias_of(first + min(channel, last));
#pragma unroll
      for (int h = 0; h < Tile::Height; ++h)
#pragma unroll
        for (int w = 0; w < Units::Targets; ++w)
#pragma unroll
          for (int i = 0; i < Units::Samples; ++i) {
            const int p = h * Tile::Width + Units::target(lane, w), sample = warp * 16 + Units::sample(lane, i);
            T& place = piece_of<Tile>(rows, p * Tile::Channels + channel, sample / 8)[sample % 8];
            float value = sums.of[h][w][o].at(i, j) * scale + bias;
            if (epilogue.residual != nullptr) value += to_float(place);
            from_float(epilogue.relu ? maximum(value, 0.0f) : value, place);
          }
    }
  __syncthreads();
  each_piece<Tile>(a, block, q_row, q_column, height, width, first_sample, rows, [&](int64 at, Vector<T, 8>* piece) {
    if (epilogue.mask != nullptr) {
      const auto mask = *reinterpret_cast<const Vector<T, 8>*>(epilogue.mask + at);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (to_float(mask.of[i]) <= 0) piece->of[i] = {};
    }
    *reinterpret_cast<Vector<T, 8>*>(a.target + at) = *piece;
  });
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kResident) conv_gather_matrix(const MatrixGatherArguments<T> arguments) {
  using Units = typename Tile::Units;
  const GatherArguments<T>& a = arguments.gather;
  const MatrixWindow& window = arguments.window;
  const int most_rows = window.rows() > Tile::OutputRows ? window.rows() : Tile::OutputRows;
  T* const rows = shared_memory<T>();
  T* const weights = rows + most_rows * Tile::Samples;
  int* const table = reinterpret_cast<int*>(weights + Tile::Channels * (window.depth + Tile::WeightPadding));

  const GatherBlock<Tile> block(a);
  const Taps row_taps = taps_of(a.rows, block.row_class), column_taps = taps_of(a.columns, block.column_class);
  const int class_rows = a.rows.targets(block.row_class), class_columns = a.columns.targets(block.column_class);
  const int sample_tiles = (a.samples + Tile::Samples - 1) / Tile::Samples;
  const int across = (a.columns.targets(0) + Tile::Width - 1) / Tile::Width;
  const int first_sample = block.part % sample_tiles * Tile::Samples;
  const int q_column = block.part / sample_tiles % across * Tile::Width;
  const int q_row = block.part / sample_tiles / across * Tile::Height;
  const int height = min(Tile::Height, class_rows - q_row), width = min(Tile::Width, class_columns - q_column);
  if (height <= 0 || width <= 0) return;  // the whole block

  const int lane = int(threadIdx.x % kLanes), warp = int(threadIdx.x / kLanes);
  const int zeros = window.rows() - 1, weight_stride = window.depth + Tile::WeightPadding;
  MatrixSums<Tile> sums = {};
  const int class_taps = row_taps.count * column_taps.count;
  for (int first = 0; class_taps > 0 && first < a.sources; first += window.chunk) {
    const int count = min(window.chunk, a.sources - first), pairs = count * class_taps;
    const int depth = (pairs + Units::Depth - 1) / Units::Depth * Units::Depth;
    __syncthreads();
    stage_source<Tile>(a, window, block, q_row * a.rows.step() + row_taps.low,
                       q_column * a.columns.step() + column_taps.low, first_sample, first, count, rows);
    if (int(threadIdx.x) < Tile::Pieces) {
      const Vector<T, 8> nothing = {};
      *reinterpret_cast<Vector<T, 8>*>(piece_of<Tile>(rows, zeros, int(threadIdx.x))) = nothing;
    }
    stage_pairs<Tile>(a, window, block, row_taps, column_taps, first, pairs, depth, weights, table);
    __syncthreads();
    for (int k = 0; k < depth; k += Units::Depth) {
      const int row = table[k + Units::pair(lane)], piece = warp * 2 + Units::piece(lane);
      unsigned right[Tile::ChannelTiles][2];
#pragma unroll
      for (int o = 0; o < Tile::ChannelTiles; ++o)
        Units::load_weights(weights + o * 8 * weight_stride + k, weight_stride, lane, right[o]);
#pragma unroll
      for (int h = 0; h < Tile::Height; ++h)
#pragma unroll
        for (int w = 0; w < Units::Targets; ++w) {
          const int pixel = h * a.rows.step() * window.width + Units::target(lane, w) * a.columns.step();
          typename Units::Source left;
          Units::load_source(piece_of<Tile>(rows, row < 0 ? zeros : row + pixel, piece), left);
#pragma unroll
          for (int o = 0; o < Tile::ChannelTiles; ++o) Units::multiply(T{}, left, right[o], sums.of[h][w][o]);
        }
    }
  }

  finish_results<Tile>(a, block, q_row, q_column, height, width, first_sample, sums, rows);
  if (a.statistics == nullptr) return;
  if (a.epilogue.mask != nullptr) __syncthreads();
  write_statistics<Tile>(a, block, rows, height, width, min(Tile::Samples, a.samples - first_sample));
}

}  // namespace bsfast
