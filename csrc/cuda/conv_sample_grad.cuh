// Weight gradient of every sample by itself, for the convolution of M branches, on batch-last memory: a thread is one
// sample of one seed and sums over the positions of its own image, so that nothing is added up between threads.
//
// A block owns a tile of channels x rows (conv_rows.cuh) of one group of one branch, for some neighbouring samples. The
// output's gradient may hold several seeds, that is several gradients of every sample: its sample r * N + n is seed r
// of sample n of the input, which is not repeated.
#pragma once

#include "cuda/conv_rows.cuh"
#include "cuda/reduce.cuh"

namespace bsfast {

template <class T>
struct SampleGradArguments {
  const T* x;     // [M or 1, groups * C_in, H, W, N]
  const T* grad;  // [M, groups * C_out, H_out, W_out, seeds * N]
  T* result;      // [M, groups * C_out, C_in, kH, kW, seeds * N]
  Range rows, columns;
  int groups, in_channels, out_channels;  // channels of one group
  int samples, gradients;                 // N, seeds * N
  bool shared_input;
};

template <int Channels_, int Rows_>
struct SampleGradTile {
  static constexpr int Channels = Channels_, Rows = Rows_;
  static constexpr int SharedBytes = Rows_ * int(sizeof(InputRow));
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kResident) conv_sample_grad(const SampleGradArguments<T> a) {
  constexpr int Q = Tile::Channels, K = Tile::Rows;
  InputRow* input_rows = shared_memory<InputRow>();
  const int all_rows = a.in_channels * a.rows.kernel * a.columns.kernel;
  unsigned rest = blockIdx.x;
  const auto next = [&rest](unsigned count) {
    const unsigned index = rest % count;
    rest /= count;
    return int(index);
  };
  // Blocks that read the same samples are neighbours.
  const int first_row = next(unsigned(all_rows + K - 1) / K) * K;
  const int first_channel = next(unsigned(a.out_channels + Q - 1) / Q) * Q;
  const int part = next((unsigned(a.gradients) + blockDim.x - 1) / blockDim.x);
  const int group = next(unsigned(a.groups)), branch = int(rest);

  const int64 x_plane = int64(a.rows.source) * a.columns.source * a.samples;
  const int64 grad_plane = int64(a.rows.target) * a.columns.target * a.gradients;
  if (int(threadIdx.x) < K)
    input_rows[threadIdx.x] = input_row(a.rows, a.columns, first_row + int(threadIdx.x), all_rows, x_plane, a.samples);
  __syncthreads();
  const int64 gradient = int64(part) * blockDim.x + threadIdx.x;
  if (gradient >= a.gradients) return;

  const T* x = a.x + (int64(a.shared_input ? 0 : branch) * a.groups + group) * a.in_channels * x_plane;
  const int64 channel = (int64(branch) * a.groups + group) * a.out_channels + first_channel;
  const T* grad = a.grad + channel * grad_plane + gradient;
  const int channels = min(Q, a.out_channels - first_channel), sample = int(gradient % a.samples);
  float sum[K][Q] = {};
  for (int row = 0; row < a.rows.target; ++row)
    for (int column = 0; column < a.columns.target; ++column, grad += a.gradients) {
      float d[Q], values[K][1];
#pragma unroll
      for (int o = 0; o < Q; ++o) d[o] = to_float(grad[(o < channels ? o : 0) * grad_plane]);
      read_rows(x + sample, a.rows, a.columns, a.samples, row, column, input_rows, values);
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int o = 0; o < Q; ++o) sum[k][o] += values[k][0] * d[o];
    }

  T* to = a.result + (channel * all_rows + first_row) * a.gradients + gradient;
#pragma unroll
  for (int o = 0; o < Q; ++o)
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (o < channels && first_row + k < all_rows) from_float(sum[k][o], to[(o * int64(all_rows) + k) * a.gradients]);
}

}  // namespace bsfast
