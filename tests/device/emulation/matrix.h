// The matrix instructions of a warp, from the fragment tables of the PTX manual ("Matrix Fragments for mma.m16n8k16",
// "Matrix Fragments for mma.m8n8k4", "Warp-level matrix load instruction: ldmatrix").
#pragma once

#include <cstdint>
#include <cstring>

#include "emulation/block.h"
#include "emulation/number.h"

namespace bsfast::emulation {

constexpr unsigned kAllLanes = 0xffffffffu;

inline float bfloat16_to_float(uint16_t bits) { return float_from_bits(uint32_t(bits) << 16); }

// d += a b for a 16x16 matrix a and a 16x8 matrix b of 16-bit numbers, and a 16x8 matrix d of floats.
template <float (*ToFloat)(uint16_t)>
void multiply_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                      const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  struct Fragments {
    float* d;
    const unsigned *a, *b;
  } mine{d, a, b};
  synchronize_warp(kAllLanes, file, line, &mine, [](void* const* lanes, unsigned) {
    float left[16][16], right[16][8];
    const auto half = [](unsigned word, int i) { return ToFloat(uint16_t(word >> 16 * i)); };
    for (int lane = 0; lane < 32; ++lane) {
      const auto& own = *static_cast<Fragments*>(lanes[lane]);
      const int group = lane / 4, within = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = group + (i % 4 >= 2 ? 8 : 0), column = within * 2 + i % 2 + (i >= 4 ? 8 : 0);
        left[row][column] = half(own.a[i / 2], i % 2);
      }
      for (int i = 0; i < 4; ++i) right[within * 2 + i % 2 + (i >= 2 ? 8 : 0)][group] = half(own.b[i / 2], i % 2);
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto& own = *static_cast<Fragments*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        double sum = double(own.d[i]);
        for (int k = 0; k < 16; ++k) sum += double(left[row][k]) * double(right[k][column]);
        own.d[i] = float(sum);
      }
    }
  });
}

// d += a b for four pairs of an 8x4 matrix a and a 4x8 matrix b of 16-bit numbers, both by columns, and 8x8 matrices d
// of floats.
template <float (*ToFloat)(uint16_t)>
void multiply_8x8x4(float (&d)[8], const unsigned (&a)[2], const unsigned (&b)[2], const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  struct Fragments {
    float* d;
    const unsigned *a, *b;
  } mine{d, a, b};
  synchronize_warp(kAllLanes, file, line, &mine, [](void* const* lanes, unsigned) {
    const auto half = [](const unsigned* words, int i) { return ToFloat(uint16_t(words[i / 2] >> 16 * (i % 2))); };
    for (int computation = 0; computation < 4; ++computation) {
      float left[8][4], right[4][8], result[8][8];
      const auto each_thread = [&](auto use) {
        for (int first : {0, 16})
          for (int lane = first + 4 * computation; lane < first + 4 * computation + 4; ++lane)
            use(lane, *static_cast<Fragments*>(lanes[lane]));
      };
      const auto each_sum = [&](auto use) {
        each_thread([&](int lane, Fragments& own) {
          for (int i = 0; i < 8; ++i) {
            const int x = (lane & 1) + (i & 2), row = lane < 16 ? x : x + 4;
            use(own.d[i], result[row][(i & 4) + (lane & 2) + (i & 1)]);
          }
        });
      };
      each_thread([&](int lane, const Fragments& own) {
        const int high = lane < 16 ? 0 : 4;
        for (int i = 0; i < 4; ++i) {
          left[i + high][lane % 4] = half(own.a, i);
          right[i][lane % 4 + high] = half(own.b, i);
        }
      });
      each_sum([](float own, float& of_matrix) { of_matrix = own; });
      for (int row = 0; row < 8; ++row)
        for (int column = 0; column < 8; ++column) {
          double sum = double(result[row][column]);
          for (int k = 0; k < 4; ++k) sum += double(left[row][k]) * double(right[k][column]);
          result[row][column] = float(sum);
        }
      each_sum([](float& own, float of_matrix) { own = of_matrix; });
    }
  });
}

// Loads four 8x8 matrices of 16-bit numbers; lane 8 i + r gives the address of row r of matrix i.
inline void load_matrices(unsigned (&to)[4], const void* row, bool transposed, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: a row must be at a multiple of 16 bytes");
  struct Arguments {
    unsigned* to;
    const void* row;
    bool transposed;
  } mine{to, row, transposed};
  synchronize_warp(kAllLanes, file, line, &mine, [](void* const* lanes, unsigned) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(matrix[lane / 8][lane % 8], static_cast<Arguments*>(lanes[lane])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const auto& own = *static_cast<Arguments*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int at = lane / 4, pair = lane % 4 * 2;
        const auto& m = matrix[i];
        own.to[i] = own.transposed ? m[pair][at] | unsigned(m[pair + 1][at]) << 16
                                   : m[at][pair] | unsigned(m[at][pair + 1]) << 16;
      }
    }
  });
}

}  // namespace bsfast::emulation
