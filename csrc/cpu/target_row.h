// Where the vectors of a target row go, and what is done to them on the way.
#pragma once

#include "cpu/around.h"
#include "cpu/lanes.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

// A row is one line of positions x chunk samples for each channel, as of the source rows.
template <class T>
struct TargetRow {
  using V = typename Lanes<T>::Vector;
  static constexpr int64_t L = Lanes<T>::count;
  // Of a channel's sums in scratch: a pivot, then the lanes' sums of deviations from it and of their squares.
  static constexpr int64_t kSums = 3 * L;

  T* row;             // first target of the group's first channel
  const T* residual;  // there, too, or null
  const T* mask;      // there, too, or null
  const T* bias;      // of the group's first channel, or null
  T* sums;            // [channel][kSums], or null
  bool relu;
  int64_t channel;  // strides, in elements
  int64_t pixel;
  int64_t chunk;    // samples of a position in the line
  int64_t samples;  // of these, how many there are
  int64_t length;   // of the line
  bool dense;       // the line is contiguous in the target, too
  bool bypass;      // every store is a full aligned vector and goes past the caches

  // Stores the vector at `at` of the line for one channel. A channel's first is at 0.
  inline void put(int64_t o, int64_t at, V value) const {
    const int64_t n = at % chunk, first = o * channel;
    if (dense ? at + L <= length : chunk % L == 0 && n + L <= samples)
      return put_whole(o, at, first + (dense ? at : at / chunk * pixel + n), value);
    put_some(o, at, first, value);
  }

  // The same for the vector that begins at sample `n` of position `q`, where chunks are whole vectors.
  inline void put(int64_t o, int64_t q, int64_t n, V value) const {
    if (n + L <= samples) return put_whole(o, q * chunk + n, o * channel + q * pixel + n, value);
    put(o, q * chunk + n, value);
  }

  // Describes what was stored for one channel.
  Moments moments(int64_t o) const {
    const double count = double(length / chunk * samples);
    const T* own = sums + o * kSums;
    double sum = 0, square = 0;
    for (int64_t i = 0; i < L; ++i) {
      sum += double(own[L + i]);
      square += double(own[2 * L + i]);
    }
    return {count, double(own[0]) + sum / count, square - sum * sum / count};
  }

 private:
  // Apart, or every register tile would hold many copies, which take minutes to compile.
  __attribute__((noinline)) void put_some(int64_t o, int64_t at, int64_t first, V value) const {
    if (bias) value += bias[o];
    T lanes[L];
    store(lanes, value);
    const auto is_target = [&](int64_t i) { return at + i < length && (at + i) % chunk < samples; };
    T stored = 0, count = 0;
    for (int64_t i = 0; i < L; ++i) {
      if (!is_target(i)) continue;
      const int64_t q = (at + i) / chunk, rest = (at + i) % chunk;
      const int64_t to = first + q * pixel + rest;
      if (residual) lanes[i] += residual[to];
      if (relu) lanes[i] = lanes[i] < T(0) ? T(0) : lanes[i];
      if (mask) lanes[i] = mask[to] <= T(0) ? T(0) : lanes[i];
      row[to] = lanes[i];
      stored += lanes[i];
      ++count;
    }
    if (!sums) return;
    if (at == 0) begin(o, stored / count);
    for (int64_t i = 0; i < L; ++i)
      if (!is_target(i)) lanes[i] = sums[o * kSums];  // adds nothing
    add(o, load(lanes));
  }

  inline void put_whole(int64_t o, int64_t at, int64_t to, V value) const {
    if (bias) value += bias[o];
    if (residual) value += load(residual + to);
    if (relu) value = rectified<T>(value);
    if (mask) value = V(load(mask + to)) <= V{} ? V{} : value;
    if (sums && at == 0) begin(o, mean_of(value));
    if (sums) add(o, value);
    return bypass ? stream(row + to, value) : store(row + to, value);
  }

  static T mean_of(V value) {
    T sum = 0;
    for (int64_t i = 0; i < L; ++i) sum += value[i];
    return sum / T(L);
  }

  // A pivot near the mean keeps the sums of squares from cancelling.
  void begin(int64_t o, T pivot) const {
    T* own = sums + o * kSums;
    *own = pivot;
    store(own + L, V{});
    store(own + 2 * L, V{});
  }

  inline void add(int64_t o, V value) const {
    T* own = sums + o * kSums;
    const V deviation = value - *own;
    store(own + L, load(own + L) + deviation);
    store(own + 2 * L, load(own + 2 * L) + deviation * deviation);
  }
};

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
