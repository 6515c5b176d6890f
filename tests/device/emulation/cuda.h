// The names of CUDA C++ that our device code uses, on the CPU. Included before any .cuh.
#pragma once

#define BSFAST_EMULATION 1

#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulation/block.h"
#include "emulation/matrix.h"
#include "emulation/number.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (bsfast::emulation::thread_index())
#define blockIdx (bsfast::emulation::block_index())
#define blockDim (bsfast::emulation::block_size())
#define gridDim (bsfast::emulation::grid_size())
#define __syncthreads() bsfast::emulation::synchronize_block(__FILE__, __LINE__)

using std::min;

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  bsfast::emulation::synchronize_warp(mask, file, line, nullptr, [](void* const*, unsigned) {});
}

namespace bsfast::emulation {

// The value of lane `source`, which is itself computed by every lane.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
  struct Exchange {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  if (source >= 32 || (mask >> source & 1) == 0) fail("a shuffle must read a lane of its mask");
  synchronize_warp(mask, file, line, &mine, [](void* const* lanes, unsigned) {
    for (int i = 0; i < 32; ++i)
      if (auto* own = static_cast<Exchange*>(lanes[i])) own->result = static_cast<Exchange*>(lanes[own->source])->value;
  });
  return mine.result;
}

}  // namespace bsfast::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return bsfast::emulation::shuffle(mask, value, source, file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return bsfast::emulation::shuffle(mask, value, bsfast::emulation::lane() ^ bits, file, line);
}

namespace bsfast {

inline float half_to_float(unsigned short bits) { return emulation::half_to_float(bits); }
inline unsigned short half_from_float(float value) { return emulation::half_from_float(value); }

inline void load_matrices(unsigned (&to)[4], const void* row) {
  emulation::load_matrices(to, row, false, __builtin_FILE(), __builtin_LINE());
}
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  emulation::load_matrices(to, row, true, __builtin_FILE(), __builtin_LINE());
}

template <class T>
float widen(uint16_t bits) {
  T value;
  value.bits = bits;
  return to_float(value);
}
template <class T>
void multiply_matrices(T, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulation::multiply_16x8x16<widen<T>>(d, a, b, __builtin_FILE(), __builtin_LINE());
}

inline void multiply_by_quad_pairs(float (&d)[8], const unsigned (&a)[2], const unsigned (&b)[2]) {
  emulation::multiply_8x8x4<emulation::half_to_float>(d, a, b, __builtin_FILE(), __builtin_LINE());
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulation::shared_memory());
}

}  // namespace bsfast
