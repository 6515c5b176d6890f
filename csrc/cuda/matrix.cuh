// The matrix units: instructions of a warp, whose fragments the PTX manual tabulates.
//
// A step of Sm80 or Sm70 adds up products over some pairs (source channel, tap), for 4 targets side by side, 16 samples
// and 8 target channels. Sources lie in shared memory as a row of samples for each pixel, in pieces of 8; weights as
// [target channel][pair].
#pragma once

#include "cuda/device.cuh"

namespace bsfast {

#if !defined(BSFAST_EMULATION)
// Loads four 8x8 matrices of 16-bit numbers; lane 8 i + r gives the address of row r of matrix i, a multiple of 16
// bytes in shared memory.
BSFAST_DEVICE void load_matrices(unsigned (&to)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
#else
  __trap();
#endif
}

// The same, each transposed.
BSFAST_DEVICE void load_matrices_transposed(unsigned (&to)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
#else
  __trap();
#endif
}

// d += a b for a 16x16 matrix a and a 16x8 matrix b, with sums in float.
#if __CUDA_ARCH__ >= 800
#define BSFAST_MULTIPLY(type)                                                \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define BSFAST_MULTIPLY(type) __trap()
#endif
BSFAST_DEVICE void multiply_matrices(Half, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  BSFAST_MULTIPLY("f16");
}
BSFAST_DEVICE void multiply_matrices(BFloat16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  BSFAST_MULTIPLY("bf16");
}
#undef BSFAST_MULTIPLY

// d += a b for an 8x4 matrix a and a 4x8 matrix b of each quad pair: lanes 4 q to 4 q + 3 and 16 more. Later devices
// have the instruction too, but not the units: the manual warns of its speed there.
BSFAST_DEVICE void multiply_by_quad_pairs(float (&d)[8], const unsigned (&a)[2], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ == 700
  asm("mma.sync.aligned.m8n8k4.col.col.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, "
      "{%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
#endif

// From sm_80 on: an instruction for each target.
struct Sm80 {
  static constexpr int Depth = 16;  // pairs of a step

  // Whose sums a lane holds.
  static constexpr int Targets = 4, Samples = 2, Channels = 2;
  static BSFAST_DEVICE int target(int, int i) { return i; }
  static BSFAST_DEVICE int sample(int lane, int i) { return lane / 4 + i * 8; }
  static BSFAST_DEVICE int channel(int lane, int i) { return lane % 4 * 2 + i; }

  struct Sums {  // of one target
    float of[4];
    BSFAST_DEVICE float at(int sample, int channel) const { return of[sample * 2 + channel]; }
  };

  // Which pair's row, and which piece of it, a lane gives to load_source: pairs 0-7 or 8-15, samples 0-7 or 8-15.
  static BSFAST_DEVICE int pair(int lane) { return lane / 16 * 8 + lane % 8; }
  static BSFAST_DEVICE int piece(int lane) { return lane / 8 % 2; }

  using Source = unsigned[4];
  static BSFAST_DEVICE void load_source(const void* piece, Source& to) { load_matrices_transposed(to, piece); }

  template <class T>
  static BSFAST_DEVICE void load_weights(const T* weights, int stride, int lane, unsigned (&to)[2]) {
    const T* from = weights + lane / 4 * stride + lane % 4 * 2;
    to[0] = *reinterpret_cast<const unsigned*>(from);
    to[1] = *reinterpret_cast<const unsigned*>(from + 8);
  }

  template <class T>
  static BSFAST_DEVICE void multiply(T, const Source& source, const unsigned (&weights)[2], Sums& sums) {
    multiply_matrices(T{}, sums.of, source, weights);
  }
};

// On sm_70, for Half only: a quad pair for each target, whose matrices a are samples 0-3 and 8-11, then the others, so
// that a lane loads one piece for both.
struct Sm70 {
  static constexpr int Depth = 4;

  static constexpr int Targets = 1, Samples = 4, Channels = 4;
  static BSFAST_DEVICE int target(int lane, int) { return lane / 4 % 4; }
  static BSFAST_DEVICE int sample(int lane, int i) { return lane / 16 * 8 + i / 2 * 4 + i % 2 * 2 + lane % 2; }
  static BSFAST_DEVICE int channel(int lane, int i) { return i / 2 * 4 + lane / 2 % 2 * 2 + i % 2; }

  struct Sums {
    float of[2][8];
    BSFAST_DEVICE float at(int sample, int channel) const {
      return of[sample / 2][channel / 2 * 4 + sample % 2 * 2 + channel % 2];
    }
  };

  static BSFAST_DEVICE int pair(int lane) { return lane % 4; }
  static BSFAST_DEVICE int piece(int lane) { return lane / 16; }

  using Source = unsigned[2][2];
  static BSFAST_DEVICE void load_source(const void* piece, Source& to) {
    const auto words = *static_cast<const Vector<unsigned, 4>*>(piece);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i / 2][i % 2] = words.of[i];
  }

  static BSFAST_DEVICE void load_weights(const Half* weights, int stride, int lane, unsigned (&to)[2]) {
    const Half* from = weights + (lane / 16 * 4 + lane % 4) * stride;
    const auto words = *reinterpret_cast<const Vector<unsigned, 2>*>(from);
    to[0] = words.of[0];
    to[1] = words.of[1];
  }

  static BSFAST_DEVICE void multiply(Half, const Source& source, const unsigned (&weights)[2], Sums& sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) multiply_by_quad_pairs(sums.of[i], source[i], weights);
  }
};

}  // namespace bsfast
