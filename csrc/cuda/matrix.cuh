// The matrix instructions of a warp, from sm_80 on, whose fragments the PTX manual tabulates.
#pragma once

#include "cuda/device.cuh"

namespace bsfast {

#if !defined(BSFAST_EMULATION)
// Loads four 8x8 matrices of 16-bit numbers, each transposed; lane 8 i + r gives the address of row r of matrix i, a
// multiple of 16 bytes in shared memory.
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
#endif

}  // namespace bsfast
