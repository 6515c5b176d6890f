// Chains of multiply-adds, more than enough to hide their latency, with nothing to load or store.
#include "cpu/fma_peak.h"

namespace bsfast {
namespace BSFAST_ISA {

double fma_burst(int64_t iterations) {
#if defined(__AVX512F__)
  constexpr int kVectorBytes = 64, kChains = 24;  // of 32 registers
#elif defined(__AVX2__)
  constexpr int kVectorBytes = 32, kChains = 12;  // of 16 registers
#else
  constexpr int kVectorBytes = 16, kChains = 10;
#endif
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  Vector chains[kChains] = {};
  Vector factor = Vector{} + 0.999f, term = Vector{} + 0.001f;
  // The compiler must not know the values, nor that the results are unused.
  asm volatile("" : "+m"(factor), "+m"(term));
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 24
    for (int chain = 0; chain < kChains; ++chain) chains[chain] = chains[chain] * factor + term;
  asm volatile("" : : "m"(chains));
  return 2.0 * kChains * (kVectorBytes / sizeof(float)) * double(iterations);
}

}  // namespace BSFAST_ISA
}  // namespace bsfast
