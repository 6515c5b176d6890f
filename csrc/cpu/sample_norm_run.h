// Sample normalisation on contiguous memory: a group of channels is one run of values, and so is each of its channels;
// lanes run along the pixels. Include it in kernels only.
#pragma once

#include <cmath>

#include "cpu/sample_moments.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

template <class T>
BSFAST_INLINE double total(const V<T>* sums) {
  T lanes[Lanes<T>::count];
  store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  double sum = 0;
  for (T lane : lanes) sum += double(lane);
  return sum;
}

// Calls body(offset, count, sum) for the vectors of [begin, end); sum says which of the independent sums is next.
template <class T, class Body>
BSFAST_INLINE void over_run(int64_t begin, int64_t end, Body body) {
  constexpr int64_t L = Lanes<T>::count;
  int64_t i = begin;
  for (; i + kSums * L <= end; i += kSums * L)
    for (int k = 0; k < kSums; ++k) body(i + k * L, L, k);
  for (; i < end; i += L) body(i, end - i < L ? end - i : L, 0);
}

template <class T>
constexpr int64_t kBlock = kTerms * kSums * Lanes<T>::count;

template <class T>
Moments<1> moments_of_run(const T* x, int64_t length) {
  Moments<1> result;
  for (int64_t begin = 0; begin < length; begin += kBlock<T>) {
    const int64_t end = begin + kBlock<T> < length ? begin + kBlock<T> : length;
    V<T> mean[kSums] = {}, sum[kSums] = {}, square[kSums] = {};
    over_run<T>(begin, end,
                [&](int64_t i, int64_t count, int k) __attribute__((always_inline)) { mean[k] += get(x + i, count); });
    const T centre = T(total<T>(mean) / double(end - begin));
    over_run<T>(begin, end, [&](int64_t i, int64_t count, int k) __attribute__((always_inline)) {
      V<T> d = get(x + i, count) - centre;
      if (count < Lanes<T>::count) d = load_some(reinterpret_cast<const T*>(&d), count);
      sum[k] += d;
      square[k] += d * d;
    });
    const double block[3] = {double(centre), total<T>(sum), total<T>(square)};
    result.add(end - begin, block, block + 1, block + 2);
  }
  return result;
}

// What of a run's group: its channels start at `channel` of x, and of what there is one of for each branch and channel.
struct Run {
  int64_t group_channels, image, channel, branch_channel;

  Run(const SampleNormShape& s, int64_t unit)
      : group_channels(s.group_channels()),
        image(s.image),
        channel(unit * group_channels),
        branch_channel(unit / (s.samples * s.groups) * s.channels + unit % s.groups * group_channels) {}

  int64_t one(int64_t k, bool per_sample) const { return (per_sample ? channel : branch_channel) + k; }
};

template <class T, bool active>
void forward_run(const SampleNormShape& s, const SampleNormForward<T>& a, int64_t unit) {
  const Run run(s, unit);
  const Moments<1> m = moments_of_run(a.x + run.channel * run.image, run.group_channels * run.image);
  const double variance = m.squares[0] / m.count, inv = 1 / std::sqrt(variance + a.eps);
  const Centred<T> mean(m.mean[0]);
  const T slope = T(a.slope);
  a.mean[unit] = m.mean[0];
  a.variance[unit] = variance;
  a.inv[unit] = inv;
  for (int64_t k = 0; k < run.group_channels; ++k) {
    const double scale = coefficient(a.scale, run.one(k, a.scale_per_sample)) * inv;
    const double shift = a.shift ? double(a.shift[run.one(k, a.shift_per_sample)]) : 0;
    const T factor = T(scale), offset = T(shift - mean.rest * scale);
    const int64_t at = (run.channel + k) * run.image;
    over_run<T>(at, at + run.image, [&](int64_t i, int64_t count, int) __attribute__((always_inline)) {
      V<T> value = (get(a.x + i, count) - mean.centre) * factor + offset;
      if (active) value = activate<T>(value, value, slope);
      put(a.y + i, value, count);
    });
  }
}

template <class T, bool active>
void backward_run(const SampleNormShape& s, const SampleNormBackward<T>& a, int64_t unit) {
  const Run run(s, unit);
  const Centred<T> mean(a.mean[unit]);
  const double inv = a.inv[unit], size = double(run.group_channels * run.image);
  const T slope = T(a.slope);
  const auto gradient = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const V<T> g = get(a.grad + i, count);
    return active ? activate<T>(g, get(a.y + i, count), slope) : g;
  };
  double first = 0, second = 0;
  for (int64_t k = 0; k < run.group_channels; ++k) {
    const int64_t at = (run.channel + k) * run.image, stop = at + run.image;
    double sum = 0, product = 0;
    for (int64_t begin = at; begin < stop; begin += kBlock<T>) {
      V<T> one[kSums] = {}, two[kSums] = {};
      const int64_t end = begin + kBlock<T> < stop ? begin + kBlock<T> : stop;
      over_run<T>(begin, end, [&](int64_t i, int64_t count, int j) __attribute__((always_inline)) {
        const V<T> g = gradient(i, count);
        one[j] += g;
        two[j] += g * (get(a.x + i, count) - mean.centre);
      });
      sum += total<T>(one);
      product += total<T>(two);
    }
    const double scale = coefficient(a.scale, run.one(k, a.scale_per_sample));
    const double normalised = (product - mean.rest * sum) * inv;
    a.shift_grad[run.channel + k] = T(sum);
    a.scale_grad[run.channel + k] = T(normalised);
    first += scale * sum;
    second += scale * normalised;
  }
  const double per_deviation = -inv * inv * second / size;
  const T tilt = T(per_deviation), offset = T(-inv * first / size - per_deviation * mean.rest);
  for (int64_t k = 0; k < run.group_channels; ++k) {
    const T factor = T(coefficient(a.scale, run.one(k, a.scale_per_sample)) * inv);
    const int64_t at = (run.channel + k) * run.image;
    over_run<T>(at, at + run.image, [&](int64_t i, int64_t count, int) __attribute__((always_inline)) {
      const V<T> d = get(a.x + i, count) - mean.centre;
      put(a.x_grad + i, gradient(i, count) * factor + (d * tilt + offset), count);
    });
  }
}

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
