// Statistics of the batch: what the blocks of a convolution found of each channel becomes its mean and variance.
#pragma once

#include "cuda/device.cuh"
#include "cuda/reduce.cuh"

namespace bsfast {

struct MergeArguments {
  const float* partial;    // [M * C, parts, 3]: count, mean, squared deviations
  float *mean, *variance;  // [M * C]; the variance divided by the count
  int64 channels;          // M * C
  int parts;
};

// Moments of a set of numbers, and of two sets together (Chan et al., 1979).
struct Moments {
  float count, mean, squares;

  BSFAST_DEVICE void add(const Moments& other) {
    const float all = count + other.count;
    if (other.count == 0) return;
    const float delta = other.mean - mean, share = other.count / all;
    mean += delta * share;
    squares += other.squares + delta * delta * count * share;
    count = all;
  }
};

// A warp owns a channel; its lanes share out the parts.
__global__ void __launch_bounds__(kThreads) merge_statistics(const MergeArguments a) {
  const int64 channel = int64(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (channel >= a.channels) return;
  const int lane = int(threadIdx.x % kLanes);
  Moments own = {0, 0, 0};
  for (int part = lane; part < a.parts; part += int(kLanes)) {
    const float* from = a.partial + (channel * a.parts + part) * 3;
    own.add({from[0], from[1], from[2]});
  }
#pragma unroll
  for (int distance = int(kLanes) / 2; distance > 0; distance /= 2)
    own.add({__shfl_xor_sync(kAllLanes, own.count, unsigned(distance)),
             __shfl_xor_sync(kAllLanes, own.mean, unsigned(distance)),
             __shfl_xor_sync(kAllLanes, own.squares, unsigned(distance))});
  if (lane != 0) return;
  a.mean[channel] = own.mean;
  a.variance[channel] = own.squares / own.count;
}

}  // namespace bsfast
