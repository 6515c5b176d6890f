// The linear maps of Winograd's minimal filtering: Tile outputs of a kernel of three taps take Tile + 2 products, one
// for each frequency. Each struct is one map along one axis, over vectors or scalars; both_axes applies it to both.
//
// Source: Lavin and Gray (2016), Fast algorithms for convolutional neural networks; points 0, 1, -1, (2, -2,) infinity.
#pragma once

#include "cpu/lanes.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

// From Tile + 2 inputs to frequencies: B^T.
template <int Tile>
struct InputTransform {
  static constexpr int in = Tile + 2, out = Tile + 2;
  template <class V>
  static inline __attribute__((always_inline)) void apply(const V* d, V* to) {
    if constexpr (Tile == 2) {
      to[0] = d[0] - d[2];
      to[1] = d[1] + d[2];
      to[2] = d[2] - d[1];
      to[3] = d[1] - d[3];
    } else {
      const V even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1], even2 = d[4] - d[2], odd2 = 2 * (d[3] - d[1]);
      to[0] = 4 * d[0] + (d[4] - 5 * d[2]);
      to[1] = even + odd;
      to[2] = even - odd;
      to[3] = even2 + odd2;
      to[4] = even2 - odd2;
      to[5] = 4 * d[1] + (d[5] - 5 * d[3]);
    }
  }
};

// Frequency I alone: row I of B^T.
template <int Tile, int I, class V>
inline __attribute__((always_inline)) V input_frequency(const V (&d)[Tile + 2]) {
  if constexpr (Tile == 2)
    return I == 0 ? d[0] - d[2] : I == 1 ? d[1] + d[2] : I == 2 ? d[2] - d[1] : d[1] - d[3];
  else if constexpr (I == 0 || I == 5)
    return 4 * d[I / 5] + (d[I / 5 + 4] - 5 * d[I / 5 + 2]);
  else if constexpr (I <= 2)
    return (d[4] - 4 * d[2]) + (I == 1 ? 1 : -1) * (d[3] - 4 * d[1]);
  else
    return (d[4] - d[2]) + (I == 3 ? 2 : -2) * (d[3] - d[1]);
}

// From frequencies to Tile outputs: A^T.
template <int Tile>
struct OutputTransform {
  static constexpr int in = Tile + 2, out = Tile;
  template <class V>
  static inline __attribute__((always_inline)) void apply(const V* m, V* to) {
    const V sum = m[1] + m[2], difference = m[1] - m[2];
    if constexpr (Tile == 2) {
      to[0] = m[0] + sum;
      to[1] = difference - m[3];
    } else {
      const V sum2 = m[3] + m[4], difference2 = m[3] - m[4];
      to[0] = m[0] + sum + sum2;
      to[1] = difference + 2 * difference2;
      to[2] = sum + 4 * sum2;
      to[3] = difference + 8 * difference2 + m[5];
    }
  }
};

// From the gradients of Tile outputs to frequencies: A, the transpose of OutputTransform.
template <int Tile>
struct GradTransform {
  static constexpr int in = Tile, out = Tile + 2;
  template <class V>
  static inline __attribute__((always_inline)) void apply(const V* g, V* to) {
    if constexpr (Tile == 2) {
      to[0] = g[0];
      to[1] = g[0] + g[1];
      to[2] = g[0] - g[1];
      to[3] = -g[1];
    } else {
      const V even = g[0] + g[2], odd = g[1] + g[3], even2 = g[0] + 4 * g[2], odd2 = 2 * (g[1] + 4 * g[3]);
      to[0] = g[0];
      to[1] = even + odd;
      to[2] = even - odd;
      to[3] = even2 + odd2;
      to[4] = even2 - odd2;
      to[5] = g[3];
    }
  }
};

// Frequency I alone: row I of A.
template <int Tile, int I, class V>
inline __attribute__((always_inline)) V grad_frequency(const V (&g)[Tile]) {
  if constexpr (I == 0)
    return g[0];
  else if constexpr (I == Tile + 1)
    return Tile == 2 ? -g[Tile - 1] : g[Tile - 1];
  else if constexpr (Tile == 2)
    return I == 1 ? g[0] + g[1] : g[0] - g[1];
  else if constexpr (I <= 2)
    return (g[0] + g[2]) + (I == 1 ? 1 : -1) * (g[1] + g[3]);
  else
    return (g[0] + 4 * g[2]) + (I == 3 ? 2 : -2) * (g[1] + 4 * g[3]);
}

// From the three taps of a kernel to frequencies: G.
template <int Tile>
struct KernelTransform {
  static constexpr int in = 3, out = Tile + 2;
  template <class V>
  static inline __attribute__((always_inline)) void apply(const V* w, V* to) {
    const V even = w[0] + w[2];
    if constexpr (Tile == 2) {
      to[0] = w[0];
      to[1] = (even + w[1]) / 2;
      to[2] = (even - w[1]) / 2;
    } else {
      const V even2 = w[0] + 4 * w[2], odd2 = 2 * w[1];
      to[0] = w[0] / 4;
      to[1] = (even + w[1]) / -6;
      to[2] = (even - w[1]) / -6;
      to[3] = (even2 + odd2) / 24;
      to[4] = (even2 - odd2) / 24;
    }
    to[Tile + 1] = w[2];
  }
};

// From frequencies to the gradients of the three taps: G^T, the transpose of KernelTransform.
template <int Tile>
struct KernelGradTransform {
  static constexpr int in = Tile + 2, out = 3;
  template <class V>
  static inline __attribute__((always_inline)) void apply(const V* z, V* to) {
    const V sum = z[1] + z[2], difference = z[1] - z[2];
    if constexpr (Tile == 2) {
      to[0] = z[0] + sum / 2;
      to[1] = difference / 2;
      to[2] = sum / 2 + z[3];
    } else {
      const V sum2 = z[3] + z[4], difference2 = z[3] - z[4];
      to[0] = z[0] / 4 - sum / 6 + sum2 / 24;
      to[1] = difference2 / 12 - difference / 6;
      to[2] = (sum2 - sum) / 6 + z[5];
    }
  }
};

// Applies a map to the columns of a square of values, then to the rows.
template <class Map, class V>
inline __attribute__((always_inline)) void both_axes(const V (&from)[Map::in][Map::in], V (&to)[Map::out][Map::out]) {
  V half[Map::out][Map::in];
#pragma GCC unroll 8
  for (int j = 0; j < Map::in; ++j) {
    V column[Map::in], mapped[Map::out];
#pragma GCC unroll 8
    for (int i = 0; i < Map::in; ++i) column[i] = from[i][j];
    Map::apply(column, mapped);
#pragma GCC unroll 8
    for (int i = 0; i < Map::out; ++i) half[i][j] = mapped[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < Map::out; ++i) Map::apply(half[i], to[i]);
}

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
