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
  const T* scale;     // of the group's first channel, or null
  const T* bias;
  T* sums;  // [channel][kSums], or null
  bool relu;
  int64_t channel;  // strides, in elements
  int64_t pixel;
  int64_t chunk;    // samples of a position in the line
  int64_t samples;  // of these, how many there are
  int64_t length;   // of the line
  bool dense;       // the line is contiguous in the target, too
  bool bypass;      // every store is a full aligned vector and goes past the caches

  // Whether `count` vectors from `at` on are vectors of the target, too.
  bool takes_whole(int64_t at, int64_t count) const {
    return dense ? at + count * L <= length : chunk % L == 0 && samples == chunk;
  }

  // Stores such a vector for one channel. A channel's first is at 0.
  inline void put_whole(int64_t o, int64_t at, V value) const {
    put_whole(o, at, o * channel + (dense ? at : at / chunk * pixel + at % chunk), value);
  }

  // Stores the last elements of a dense line, less than a vector.
  inline void put_last(int64_t o, int64_t at, V value) const {
    put_some(o, at == 0, o * channel + at, value, length - at);
  }

  // Stores `count` elements of the line, not all of which need be targets. A function of its own, which takes them from
  // memory: else callers keep the sums that they add up to in memory.
  __attribute__((noinline)) void put_some(int64_t o, int64_t at, const T* values, int64_t count) const {
    const int64_t last = at + count < length ? at + count : length;
    if (chunk == 1 && !dense && !sums) {  // one element a position
      const T factor = scale ? scale[o] : T(1), added = bias ? bias[o] : T(0);
      for (int64_t q = at; q < last; ++q) {
        const int64_t to = o * channel + q * pixel;
        const T value = values[q - at] * factor + added + (residual ? residual[to] : T(0));
        row[to] = (relu && value < T(0)) || (mask && mask[to] <= T(0)) ? T(0) : value;
      }
      return;
    }
    for (int64_t i = at, q = at / chunk, n = at % chunk, run; i < last; i += run, n = 0, ++q) {
      run = chunk - n < last - i ? chunk - n : last - i;  // of one position
      const int64_t there = samples - n < run ? samples - n : run;
      for (int64_t done = 0, taken; done < there; done += taken) {
        taken = there - done < L ? there - done : L;
        put_some(o, i + done == 0, o * channel + q * pixel + n + done, load_some(values + i - at + done, taken), taken);
      }
    }
  }

  // Stores the vector that begins at sample `n` of position `q`, where chunks are whole vectors.
  inline void put(int64_t o, int64_t q, int64_t n, V value) const {
    if (n + L <= samples) return put_whole(o, q * chunk + n, o * channel + q * pixel + n, value);
    T lanes[L];
    store(lanes, value);
    put_some(o, q * chunk + n, lanes, L);
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
  inline V scaled(int64_t o, V value) const {
    if (scale) value *= scale[o];
    return bias ? value + bias[o] : value;
  }

  inline void put_whole(int64_t o, int64_t at, int64_t to, V value) const {
    value = scaled(o, value);
    if (residual) value += load(residual + to);
    if (relu) value = rectified<T>(value);
    if (mask) value = load(mask + to) <= V{} ? V{} : value;
    if (sums && at == 0) begin(o, sum_of_lanes<T>(value) / T(L));
    if (sums) add(o, value);
    return bypass ? stream(row + to, value) : store(row + to, value);
  }

  inline void put_some(int64_t o, bool first, int64_t to, V value, int64_t count) const {
    value = scaled(o, value);
    if (residual) value += load_some(residual + to, count);
    if (relu) value = rectified<T>(value);
    if (mask) value = load_some(mask + to, count) <= V{} ? V{} : value;
    store_some(row + to, count, value);
    if (!sums) return;
    T lanes[L];
    for (int64_t i = 0; i < L; ++i) lanes[i] = i < count ? value[i] : T(0);
    if (first) begin(o, sum_of_lanes<T>(load(lanes)) / T(count));
    for (int64_t i = count; i < L; ++i) lanes[i] = sums[o * kSums];  // adds nothing
    add(o, load(lanes));
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
