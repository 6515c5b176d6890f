// Vectors of the instruction set that the including file is compiled for (BSFAST_ISA); include it in kernels only.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if BSFAST_X86
#include <immintrin.h>
#endif

namespace bsfast {
namespace BSFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
constexpr int kAccumulators = 24;  // of 32 registers, beside the operands
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
constexpr int kAccumulators = 12;  // of 16
#else
constexpr int64_t kVectorBytes = 16;
constexpr int kAccumulators = 12;
#endif

template <class T>
struct Lanes {
  static constexpr int64_t count = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(sizeof(T))));
};

template <class T>
inline typename Lanes<T>::Vector load(const T* from) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(from);
}

// The first `count` elements; the other lanes are zero.
template <class T>
inline typename Lanes<T>::Vector load_some(const T* from, int64_t count) {
  typename Lanes<T>::Vector value{};
  std::memcpy(&value, from, size_t(count) * sizeof(T));
  return value;
}

template <class T>
inline void store(T* to, typename Lanes<T>::Vector value) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(to) = value;
}

// Larger results cannot stay in the last-level cache.
constexpr int64_t kStreamBytes = 16 * 1024 * 1024;

// Stores a vector at an aligned address past the caches, which saves reading the line before writing it.
template <class T>
inline void stream(T* to, typename Lanes<T>::Vector value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#elif BSFAST_X86
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)value);
#else
  store(to, value);
#endif
}

// Makes streamed results visible to whoever waits for this thread.
inline void stream_fence() {
#if BSFAST_X86
  _mm_sfence();
#endif
}

// ReLU; keeps what is not a number.
template <class T>
inline typename Lanes<T>::Vector rectified(typename Lanes<T>::Vector value) {
  using V = typename Lanes<T>::Vector;
  return value < V{} ? V{} : value;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
