// 3x3 stride-1 convolution of M branches on batch-last memory, one version per instruction set.
#pragma once

#include <cstddef>

#include "isa.h"
#include "shape.h"

namespace bsfast {

// Output rows of all branches, in the order (branch, block of samples, row), are the units of parallel work.
template <class T>
struct Conv3x3 {
  int64_t (*rows)(const ConvShape&);         // how many units of work there are
  size_t (*scratch_size)(const ConvShape&);  // elements of T that one worker needs, 64-byte aligned
  // Computes the units [begin, end).
  void (*run)(const ConvShape&, const T* x,  // [M or 1, C_in, H, W, N]
              const T* weight,               // [M, C_out, C_in, 3, 3]
              T* y,                          // [M, C_out, H_out, W_out, N]
              T* scratch, int64_t begin, int64_t end);
};

#define BSFAST_DECLARE(isa) \
  namespace isa {           \
  template <class T>        \
  Conv3x3<T> conv3x3();     \
  }
BSFAST_DECLARE(baseline)
#if BSFAST_X86
BSFAST_DECLARE(avx2)
BSFAST_DECLARE(avx512)
#endif
#undef BSFAST_DECLARE

template <class T>
Conv3x3<T> conv3x3([[maybe_unused]] Isa isa) {
#if BSFAST_X86
  if (isa == Isa::avx512) return avx512::conv3x3<T>();
  if (isa == Isa::avx2) return avx2::conv3x3<T>();
#endif
  return baseline::conv3x3<T>();
}

}  // namespace bsfast
