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

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }
inline __m512 masked_load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
inline __m512d masked_load(const double* from, int64_t count) {
  return _mm512_maskz_loadu_pd(__mmask8(first_lanes(count)), from);
}
inline void masked_store(float* to, int64_t count, __m512 value) {
  _mm512_mask_storeu_ps(to, first_lanes(count), value);
}
inline void masked_store(double* to, int64_t count, __m512d value) {
  _mm512_mask_storeu_pd(to, __mmask8(first_lanes(count)), value);
}
#endif

// The first `count` elements; the other lanes are zero.
template <class T>
inline typename Lanes<T>::Vector load_some(const T* from, int64_t count) {
#if defined(__AVX512F__)
  return (typename Lanes<T>::Vector)masked_load(from, count);
#else
  typename Lanes<T>::Vector value{};
  std::memcpy(&value, from, size_t(count) * sizeof(T));
  return value;
#endif
}

template <class T>
inline void store(T* to, typename Lanes<T>::Vector value) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(to) = value;
}

template <class T>
inline void store_some(T* to, int64_t count, typename Lanes<T>::Vector value) {
#if defined(__AVX512F__)
  masked_store(to, count, value);
#else
  std::memcpy(to, &value, size_t(count) * sizeof(T));
#endif
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

// Adds up halves of a vector until one has no more than so many bytes.
template <class T, int64_t PartBytes, int64_t Bytes = kVectorBytes>
inline __attribute__((always_inline)) auto folded(const void* vector) {
  typedef T Half __attribute__((vector_size(Bytes > PartBytes ? Bytes / 2 : Bytes), may_alias));
  Half half[2];
  std::memcpy(half, vector, Bytes);
  if constexpr (Bytes > PartBytes) {
    half[0] += half[1];
    return folded<T, PartBytes, Bytes / 2>(half);
  } else {
    return half[0];
  }
}

// The sum of all lanes.
template <class T>
inline T sum_of_lanes(typename Lanes<T>::Vector value) {
  const auto part = folded<T, 16>(&value);
  T sum = part[0] + part[1];
  if constexpr (sizeof(part) / sizeof(T) == 4) sum += part[2] + part[3];
  return sum;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
