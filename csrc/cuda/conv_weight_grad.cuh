// Weight gradient of the convolution of M branches on batch-last memory: the product of the output's gradient, one row
// for each output channel, with the input, one row for each (channel, tap), over all positions and samples.
//
// A block owns a tile of channels x rows of one group of one branch, and a part of the positions and samples, which its
// threads share out with samples first. A thread keeps the whole tile's sums; they are added up over the block at the
// end. The sums of the parts are added up by a second kernel, so that every sum has one order.
#pragma once

#include "cuda/conv_around.cuh"
#include "cuda/conv_rows.cuh"
#include "cuda/reduce.cuh"

namespace bsfast {

template <class T>
struct WeightGradArguments {
  const T* x;           // [M or 1, groups * C_in, H, W, N]
  const T* grad;        // [M, groups * C_out, H_out, W_out, N]
  float* partial;       // [parts, M, groups * C_out, C_in, kH, kW]
  Normalise normalise;  // of x
  Range rows, columns;
  int branches, groups, in_channels, out_channels;  // channels of one group
  int samples;
  bool shared_input;
  int parts;
};

template <int Channels_, int Rows_, int Samples_>
struct WeightGradTile {
  static constexpr int Channels = Channels_, Rows = Rows_;
  static constexpr int Samples = Samples_;  // of a vector
  static constexpr int SharedBytes = Rows * int(sizeof(InputRow)) + (kWarps + 2) * Rows * int(sizeof(float));
};

// Counts three nested loops' rounds, `step` apart, without a division for each.
struct Counter {
  int inner_size, middle_size;
  int inner_step, middle_step, outer_step;  // one step, in these
  int inner, middle, outer;

  BSFAST_DEVICE Counter(int first, int step, int inner_size, int middle_size)
      : inner_size(inner_size), middle_size(middle_size) {
    inner = first % inner_size;
    middle = first / inner_size % middle_size;
    outer = first / inner_size / middle_size;
    inner_step = step % inner_size;
    middle_step = step / inner_size % middle_size;
    outer_step = step / inner_size / middle_size;
  }
  BSFAST_DEVICE void next() {
    inner += inner_step;
    middle += middle_step;
    outer += outer_step;
    if (inner >= inner_size) {
      inner -= inner_size;
      ++middle;
    }
    if (middle >= middle_size) {
      middle -= middle_size;
      ++outer;
    }
  }
};

// On one multiprocessor; the most that spill no registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 750 || __CUDA_ARCH__ >= 1200)
constexpr int kWeightGradBlocks = 2;
#else
constexpr int kWeightGradBlocks = 3;
#endif

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kWeightGradBlocks) conv_weight_grad(const WeightGradArguments<T> a) {
  constexpr int Q = Tile::Channels, K = Tile::Rows, V = Tile::Samples;
  InputRow* input_rows = shared_memory<InputRow>();
  float* reduction = reinterpret_cast<float*>(input_rows + K);
  float* coefficients = reduction + kWarps * K;  // scale and shift of each row
  const int taps = a.rows.kernel * a.columns.kernel, all_rows = a.in_channels * taps;
  unsigned rest = blockIdx.x;
  const auto next = [&rest](int count) {
    const unsigned index = rest % unsigned(count);
    rest /= unsigned(count);
    return int(index);
  };
  const int first_row = next((all_rows + K - 1) / K) * K, first_channel = next((a.out_channels + Q - 1) / Q) * Q;
  const int part = next(a.parts), group = next(a.groups), branch = int(rest);

  const int64 x_plane = int64(a.rows.source) * a.columns.source * a.samples;
  const int64 grad_plane = int64(a.rows.target) * a.columns.target * a.samples;
  const int64 in_group = int64(a.shared_input ? 0 : branch) * a.groups + group;
  if (int(threadIdx.x) < K) {
    const int k = first_row + int(threadIdx.x);
    input_rows[threadIdx.x] = input_row(a.rows, a.columns, k, all_rows, x_plane, a.samples);
    if (a.normalise.scale != nullptr && k < all_rows) {
      coefficients[threadIdx.x * 2] = a.normalise.scale[in_group * a.in_channels + k / taps];
      coefficients[threadIdx.x * 2 + 1] = a.normalise.shift[in_group * a.in_channels + k / taps];
    }
  }
  __syncthreads();

  const T* x = a.x + in_group * a.in_channels * x_plane;
  const T* grad = a.grad + ((int64(branch) * a.groups + group) * a.out_channels + first_channel) * grad_plane;
  const int channels = min(Q, a.out_channels - first_channel);
  const int vectors = a.samples / V, units = a.rows.target * a.columns.target * vectors;
  const int begin = int(int64(units) * part / a.parts), end = int(int64(units) * (part + 1) / a.parts);
  float sum[K][Q] = {};
  // Vectors of samples, columns, rows.
  Counter at(begin + int(threadIdx.x), kThreads, vectors, a.columns.target);
  for (int unit = begin + int(threadIdx.x); unit < end; unit += kThreads, at.next()) {
    const T* from_grad = grad + (at.outer * a.columns.target + at.middle) * a.samples + at.inner * V;
    float d[Q][V];
#pragma unroll
    for (int o = 0; o < Q; ++o) load(from_grad + (o < channels ? o : 0) * grad_plane, d[o]);
    float values[K][V];
    const unsigned inside =
        read_rows(x + at.inner * V, a.rows, a.columns, a.samples, at.outer, at.middle, input_rows, values);
    if (a.normalise.scale != nullptr) {
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float value = a.normalise(values[k][v], coefficients[k * 2], coefficients[k * 2 + 1]);
          values[k][v] = inside >> k & 1 ? value : 0.0f;
        }
    }
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int o = 0; o < Q; ++o) sum[k][o] += values[k][v] * d[o][v];
  }

  const int64 weights = int64(a.groups) * a.out_channels * all_rows;  // of a branch
  float* to = a.partial + (int64(part) * a.branches + branch) * weights +
              (int64(group) * a.out_channels + first_channel) * all_rows + first_row;
#pragma unroll
  for (int o = 0; o < Q; ++o) {
    float total[K];
#pragma unroll
    for (int k = 0; k < K; ++k) total[k] = sum[k][o];
    block_sums(total, reduction);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (int(threadIdx.x) == k && o < channels && first_row + k < all_rows) to[o * int64(all_rows) + k] = total[k];
  }
}

template <class T>
struct SumPartsArguments {
  const float* partial;  // [parts, count]
  T* total;              // [count]
  int64 count;
  int parts;
};

// Adds up the parts of each number, which one thread owns, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts(const SumPartsArguments<T> a) {
  const int64 i = int64(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.count) return;
  float sum = a.partial[i];
  for (int part = 1; part < a.parts; ++part) sum += a.partial[part * a.count + i];
  from_float(sum, a.total[i]);
}

}  // namespace bsfast
