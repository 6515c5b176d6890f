// What kernels need beside the language: storage types, vectors of them, shared memory. Includes nothing, so that NVRTC
// and, in tests, an emulation on the CPU compile it, too; what only a GPU can do is the emulation's to define.
#pragma once

#define BSFAST_DEVICE __device__ __forceinline__

namespace bsfast {

using int64 = long long;

constexpr unsigned kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#if !defined(BSFAST_EMULATION)
BSFAST_DEVICE float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

BSFAST_DEVICE unsigned short half_from_float(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

template <class T>
BSFAST_DEVICE T* shared_memory() {
  extern __shared__ float4 bytes[];  // aligned for every vector
  return reinterpret_cast<T*>(bytes);
}
#endif

struct Half {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

BSFAST_DEVICE float to_float(float value) { return value; }
BSFAST_DEVICE float to_float(Half value) { return half_to_float(value.bits); }
BSFAST_DEVICE float to_float(BFloat16 value) {
  union {
    unsigned bits;
    float value;
  } wide = {unsigned(value.bits) << 16};
  return wide.value;
}

// Rounds to the nearest, ties to even.
BSFAST_DEVICE void from_float(float value, float& to) { to = value; }
BSFAST_DEVICE void from_float(float value, Half& to) { to.bits = half_from_float(value); }
BSFAST_DEVICE void from_float(float value, BFloat16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
  union {
    float value;
    unsigned bits;
  } wide = {value};
  const bool nan = (wide.bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = nan ? 0x7fffu : (unsigned short)((wide.bits + 0x7fffu + (wide.bits >> 16 & 1u)) >> 16);
#endif
}

// The larger, or `a` if it is NaN, which fmaxf would drop.
BSFAST_DEVICE float maximum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a < b ? b : a;
#endif
}

// `Count` numbers that one instruction loads or stores.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Vector {
  T of[Count];
};

template <int Count, class T>
BSFAST_DEVICE void load(const T* from, float (&to)[Count]) {
  const auto vector = *reinterpret_cast<const Vector<T, Count>*>(from);
#pragma unroll
  for (int i = 0; i < Count; ++i) to[i] = to_float(vector.of[i]);
}

// Stores, and leaves in `value` what has been stored: its rounding.
template <int Count, class T>
BSFAST_DEVICE void store(float (&value)[Count], T* to) {
  Vector<T, Count> vector;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    from_float(value[i], vector.of[i]);
    value[i] = to_float(vector.of[i]);
  }
  *reinterpret_cast<Vector<T, Count>*>(to) = vector;
}

}  // namespace bsfast
