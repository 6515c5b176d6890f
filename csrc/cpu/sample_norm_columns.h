// Sample normalisation on batch-last memory: a lane is a sample, and all arithmetic is vertical. Include it in kernels
// only.
#pragma once

#include <cmath>

#include "cpu/sample_moments.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

// The group of a branch for some samples: `vectors` vectors of them; of a single vector `last` lanes are samples.
template <class T, int vectors>
struct Columns {
  static constexpr int64_t L = Lanes<T>::count, size = vectors * L;
  const SampleNormShape& s;
  int64_t group, sample, last;  // group of all branches, first sample

  int64_t lanes() const { return vectors > 1 ? size : last; }
  int64_t channel() const { return group * s.group_channels(); }
  int64_t statistic() const { return group * s.samples + sample; }
  int64_t at(int64_t channel) const { return channel * s.image * s.samples + sample; }
  int64_t one(int64_t channel, bool per_sample, int64_t lane) const {
    return per_sample ? channel * s.samples + sample + lane : channel;
  }

  // Calls body(offset, vector, count) for every vector of the rows [begin, end).
  template <class Body>
  BSFAST_INLINE void over(int64_t begin, int64_t end, Body body) const {
    for (int64_t r = begin; r < end; ++r)
      for (int v = 0; v < vectors; ++v) body(r * s.samples + v * L, v, vectors > 1 ? L : last);
  }

  Moments<size> moments(const T* x) const {
    const int64_t rows = s.group_channels() * s.image;
    Moments<size> result;
    for (int64_t begin = 0; begin < rows; begin += kTerms) {
      const int64_t end = begin + kTerms < rows ? begin + kTerms : rows;
      V<T> centre[vectors] = {}, sum[vectors] = {}, square[vectors] = {};
      over(begin, end,
           [&](int64_t i, int v, int64_t count) __attribute__((always_inline)) { centre[v] += get(x + i, count); });
      for (V<T>& value : centre) value *= T(1 / double(end - begin));
      over(begin, end, [&](int64_t i, int v, int64_t count) __attribute__((always_inline)) {
        const V<T> d = get(x + i, count) - centre[v];
        sum[v] += d;
        square[v] += d * d;
      });
      T flat[3][size];
      std::memcpy(flat[0], centre, sizeof centre);
      std::memcpy(flat[1], sum, sizeof sum);
      std::memcpy(flat[2], square, sizeof square);
      result.add(end - begin, flat[0], flat[1], flat[2]);
    }
    return result;
  }

  template <bool active>
  void forward(const SampleNormForward<T>& a) const {
    const Moments<size> m = moments(a.x + at(channel()));
    T centre[size] = {}, factor[size] = {}, offset[size] = {};
    double inv[size], rest[size];
    for (int64_t i = 0; i < lanes(); ++i) {
      const double variance = m.squares[i] / m.count;
      const Centred<T> mean(m.mean[i]);
      centre[i] = mean.centre;
      rest[i] = mean.rest;
      a.mean[statistic() + i] = m.mean[i];
      a.variance[statistic() + i] = variance;
      a.inv[statistic() + i] = inv[i] = 1 / std::sqrt(variance + a.eps);
    }
    const T slope = T(a.slope);
    for (int64_t c = channel(); c < channel() + s.group_channels(); ++c) {
      for (int64_t i = 0; i < lanes(); ++i) {
        const double scale = coefficient(a.scale, one(c, a.scale_per_sample, i)) * inv[i];
        factor[i] = T(scale);
        offset[i] = T((a.shift ? double(a.shift[one(c, a.shift_per_sample, i)]) : 0) - rest[i] * scale);
      }
      const T* x = a.x + at(c);
      T* y = a.y + at(c);
      over(0, s.image, [&](int64_t i, int v, int64_t count) __attribute__((always_inline)) {
        V<T> value = (get(x + i, count) - load(centre + v * L)) * load(factor + v * L) + load(offset + v * L);
        if (active) value = activate<T>(value, value, slope);
        put(y + i, value, count);
      });
    }
  }

  template <bool active>
  void backward(const SampleNormBackward<T>& a) const {
    const T slope = T(a.slope);
    T centre[size] = {}, factor[size] = {}, tilt[size] = {}, offset[size] = {};
    double inv[size], rest[size], first[size] = {}, second[size] = {};
    for (int64_t i = 0; i < lanes(); ++i) {
      const Centred<T> mean(a.mean[statistic() + i]);
      centre[i] = mean.centre;
      rest[i] = mean.rest;
      inv[i] = a.inv[statistic() + i];
    }
    for (int64_t c = channel(); c < channel() + s.group_channels(); ++c) {
      double sum[size] = {}, product[size] = {};
      sums<active>(a, c, centre, sum, product);
      for (int64_t i = 0; i < lanes(); ++i) {
        const double scale = coefficient(a.scale, one(c, a.scale_per_sample, i));
        const double normalised = (product[i] - rest[i] * sum[i]) * inv[i];
        a.shift_grad[one(c, true, i)] = T(sum[i]);
        a.scale_grad[one(c, true, i)] = T(normalised);
        first[i] += scale * sum[i];
        second[i] += scale * normalised;
      }
    }
    const double count = double(s.group_channels() * s.image);
    for (int64_t i = 0; i < lanes(); ++i) {
      const double per_deviation = -inv[i] * inv[i] * second[i] / count;
      tilt[i] = T(per_deviation);
      offset[i] = T(-inv[i] * first[i] / count - per_deviation * rest[i]);
    }
    for (int64_t c = channel(); c < channel() + s.group_channels(); ++c) {
      for (int64_t i = 0; i < lanes(); ++i) factor[i] = T(coefficient(a.scale, one(c, a.scale_per_sample, i)) * inv[i]);
      const T *x = a.x + at(c), *y = a.y + at(c), *grad = a.grad + at(c);
      T* x_grad = a.x_grad + at(c);
      over(0, s.image, [&](int64_t i, int v, int64_t n) __attribute__((always_inline)) {
        V<T> g = get(grad + i, n);
        if (active) g = activate<T>(g, get(y + i, n), slope);
        const V<T> d = get(x + i, n) - load(centre + v * L);
        put(x_grad + i, g * load(factor + v * L) + (d * load(tilt + v * L) + load(offset + v * L)), n);
      });
    }
  }

  // Sums over a channel of the gradient g that passes the activation, and of g (x - centre).
  template <bool active>
  void sums(const SampleNormBackward<T>& a, int64_t c, const T* centre, double* sum, double* product) const {
    const T *x = a.x + at(c), *y = a.y + at(c), *grad = a.grad + at(c);
    const T slope = T(a.slope);
    for (int64_t begin = 0; begin < s.image; begin += kTerms) {
      V<T> block[2][vectors] = {};
      const int64_t end = begin + kTerms < s.image ? begin + kTerms : s.image;
      over(begin, end, [&](int64_t i, int v, int64_t count) __attribute__((always_inline)) {
        V<T> g = get(grad + i, count);
        if (active) g = activate<T>(g, get(y + i, count), slope);
        block[0][v] += g;
        block[1][v] += g * (get(x + i, count) - load(centre + v * L));
      });
      T flat[2][size];
      std::memcpy(flat, block, sizeof flat);
      for (int64_t i = 0; i < size; ++i) {
        sum[i] += double(flat[0][i]);
        product[i] += double(flat[1][i]);
      }
    }
  }
};

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
