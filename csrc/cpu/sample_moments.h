// What both memory orders of sample normalisation share. Values are centred before they are scaled, and statistics are
// double: a mean far larger than the deviations from it costs no digits. Include it in kernels only.
#pragma once

#include "cpu/lanes.h"
#include "cpu/sample_norm.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

constexpr int64_t kTerms = 64;  // values summed in T, in each lane, before the sums go on in double
constexpr int kSums = 4;        // independent sums: additions need not wait for one another

template <class T>
using V = typename Lanes<T>::Vector;

#define BSFAST_INLINE inline __attribute__((always_inline))

template <class T>
BSFAST_INLINE V<T> get(const T* from, int64_t count) {
  return count == Lanes<T>::count ? load(from) : load_some(from, count);
}

template <class T>
BSFAST_INLINE void put(T* to, V<T> value, int64_t count) {
  if (count == Lanes<T>::count) return store(to, value);
  store_some(to, count, value);
}

template <class T>
BSFAST_INLINE V<T> activate(V<T> value, V<T> condition, T slope) {
  return condition > V<T>{} ? value : value * slope;
}

// Mean and sum of squared deviations of `lanes` groups, merged from blocks (Chan et al., 1979).
template <int64_t lanes>
struct Moments {
  double count = 0, mean[lanes] = {}, squares[lanes] = {};

  // Adds n values a lane: sums of their deviations from a centre, and of the squares of these.
  template <class T>
  void add(int64_t n, const T* centre, const T* sum, const T* square) {
    const double all = count + double(n), each = 1 / double(n), share = double(n) / all, weight = count * share;
    for (int64_t i = 0; i < lanes; ++i) {
      const double rest = double(sum[i]) * each, delta = double(centre[i]) + rest - mean[i];
      squares[i] += double(square[i]) - double(sum[i]) * rest + delta * delta * weight;
      mean[i] += delta * share;
    }
    count = all;
  }
};

// The mean as kernels in T subtract it: first `centre`, then what rounding left of it.
template <class T>
struct Centred {
  T centre;
  double rest;

  explicit Centred(double mean) : centre(T(mean)), rest(mean - double(centre)) {}
};

template <class T>
BSFAST_INLINE double coefficient(const T* values, int64_t at) {
  return values ? double(values[at]) : 1;
}

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
