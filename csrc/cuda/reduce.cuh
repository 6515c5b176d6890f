// Sums over the threads of a block, always in the same order.
#pragma once

#include "cuda/device.cuh"

namespace bsfast {

constexpr int kWarps = 4;  // of every block
constexpr int kThreads = kWarps * int(kLanes);

// Blocks of convolutions on one multiprocessor: the most that spill no registers, of which a thread then has 168, on
// Volta 255.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
constexpr int kResident = 2;
#else
constexpr int kResident = 3;
#endif

// Adds up each of `Count` values, a power of two, over the lanes of a warp; lane i gets the sum of value i % Count.
// Each exchange halves the values that a lane still holds, so that 8 values take 9 shuffles instead of 40.
template <int Count>
BSFAST_DEVICE float lane_sums(float (&value)[Count]) {
  static_assert(Count <= int(kLanes) && (Count & (Count - 1)) == 0, "the number of values must be a power of two");
  const int lane = int(threadIdx.x % kLanes);
#pragma unroll
  for (int half = Count / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? value[i + half] : value[i], give = upper ? value[i] : value[i + half];
      value[i] = keep + __shfl_xor_sync(kAllLanes, give, unsigned(half));
    }
  }
#pragma unroll
  for (int distance = Count; distance < int(kLanes); distance *= 2)
    value[0] += __shfl_xor_sync(kAllLanes, value[0], unsigned(distance));
  return value[0];
}

constexpr int kSumsAtOnce = 8;

// Adds up each of `Count` values over the block's threads, which all get the sums. `shared` has kWarps * Count floats
// that nothing else uses between the barriers around this.
template <int Count>
BSFAST_DEVICE void block_sums(float (&value)[Count], float* shared) {
  const int lane = int(threadIdx.x % kLanes), warp = int(threadIdx.x / kLanes);
#pragma unroll
  for (int first = 0; first < Count; first += kSumsAtOnce) {
    float some[kSumsAtOnce];
#pragma unroll
    for (int i = 0; i < kSumsAtOnce; ++i) some[i] = first + i < Count ? value[first + i < Count ? first + i : 0] : 0.0f;
    const float sum = lane_sums(some);
    if (lane < kSumsAtOnce && first + lane < Count) shared[warp * Count + first + lane] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    value[i] = shared[i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) value[i] += shared[w * Count + i];
  }
  __syncthreads();
}

}  // namespace bsfast
