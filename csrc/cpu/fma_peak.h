// The most multiply-adds a core can do: the yardstick of every kernel, one version per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bsfast {

// Runs independent chains of float32 multiply-adds in registers; returns how many floating-point operations that were.
using FmaBurst = double (*)(int64_t iterations);

namespace baseline {
double fma_burst(int64_t iterations);
}
#if BSFAST_X86
namespace avx2 {
double fma_burst(int64_t iterations);
}
namespace avx512 {
double fma_burst(int64_t iterations);
}
#endif

inline FmaBurst fma_burst([[maybe_unused]] Isa isa) {
#if BSFAST_X86
  if (isa == Isa::avx512) return avx512::fma_burst;
  if (isa == Isa::avx2) return avx2::fma_burst;
#endif
  return baseline::fma_burst;
}

}  // namespace bsfast
