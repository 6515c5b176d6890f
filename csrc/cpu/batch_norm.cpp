// Batch normalisation over the vector width, compiled per instruction set. A channel of the usual sizes fits the
// second-level cache, so its second pass reads no memory.
#include "cpu/batch_norm.h"

#include <cmath>

#include "cpu/lanes.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

constexpr int kStreams = 4;       // independent sums: additions need not wait for one another
constexpr int64_t kBlock = 2048;  // elements summed in T before the sums go on in double

template <class T>
using V = typename Lanes<T>::Vector;

template <class T>
inline double total(V<T> value) {
  T lanes[Lanes<T>::count];
  store(lanes, value);
  double sum = 0;
  for (T lane : lanes) sum += double(lane);
  return sum;
}

template <class T>
inline V<T> where_positive(V<T> value, V<T> condition) {
  return condition > V<T>{} ? value : V<T>{};
}

// Calls body(offset, count) for each vector of [0, length); count is less than a vector's lanes in the last one only.
template <class T, class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t length, Body body) {
  constexpr int64_t L = Lanes<T>::count;
  int64_t i = 0;
  for (; i + L <= length; i += L) body(i, L);
  if (i < length) body(i, length - i);
}

template <class T>
inline __attribute__((always_inline)) V<T> get(const T* from, int64_t count) {
  return count == Lanes<T>::count ? load(from) : load_some(from, count);
}

template <class T>
inline __attribute__((always_inline)) void put(T* to, V<T> value, int64_t count) {
  if (count == Lanes<T>::count) return store(to, value);
  std::memcpy(to, &value, size_t(count) * sizeof(T));
}

// Mean and mean square deviation of a channel: of each block by two passes over it, merged in double (Chan et al.,
// 1979).
template <class T>
void statistics(const ChannelShape& s, const T* x, double& mean, double& variance) {
  constexpr int64_t L = Lanes<T>::count;
  double count = 0, m2 = 0;
  mean = 0;
  for (int64_t r = 0; r < s.repeats; ++r)
    for (int64_t begin = 0; begin < s.length; begin += kBlock) {
      const T* block = x + r * s.channels * s.length + begin;
      const int64_t n = s.length - begin < kBlock ? s.length - begin : kBlock;
      V<T> sum[kStreams] = {};
      int64_t i = 0;
      for (; i + kStreams * L <= n; i += kStreams * L)
        for (int k = 0; k < kStreams; ++k) sum[k] += load(block + i + k * L);
      for (; i < n; i += L) sum[0] += get(block + i, n - i < L ? n - i : L);
      const double block_mean = total<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) / double(n);
      const T centre = T(block_mean);
      V<T> square[kStreams] = {};
      for (i = 0; i + kStreams * L <= n; i += kStreams * L)
        for (int k = 0; k < kStreams; ++k) {
          const V<T> d = load(block + i + k * L) - centre;
          square[k] += d * d;
        }
      double rest = 0;
      for (; i < n; ++i) rest += double(block[i] - centre) * double(block[i] - centre);
      const double error = block_mean - double(centre);  // of the centre, by rounding
      const double block_m2 =
          total<T>((square[0] + square[1]) + (square[2] + square[3])) + rest - double(n) * error * error;
      const double delta = block_mean - mean, all = count + double(n);
      mean += delta * double(n) / all;
      m2 += block_m2 + delta * delta * count * double(n) / all;
      count = all;
    }
  variance = m2 / count;
}

template <class T, bool Relu, bool Residual>
void normalise(const ChannelShape& s, const T* x, const T* residual, T* y, T scale, T shift) {
  for (int64_t r = 0; r < s.repeats; ++r) {
    const int64_t at = r * s.channels * s.length;
    for_vectors<T>(s.length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      V<T> value = get(x + at + i, count) * scale + shift;
      if (Residual) value += get(residual + at + i, count);
      if (Relu) value = where_positive<T>(value, value);
      put(y + at + i, value, count);
    });
  }
}

template <class T>
void forward(const ChannelShape& s, const BatchNormForward<T>& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t branch = unit / s.channels, c = unit % s.channels;
    const int64_t at = (branch * s.repeats * s.channels + c) * s.length;
    double mean, variance;
    statistics(s, a.x + at, mean, variance);
    const double inv = 1 / std::sqrt(variance + a.eps);
    a.mean[unit] = T(mean);
    a.inv[unit] = T(inv);
    a.variance[unit] = T(variance);
    const double scale = (a.weight ? double(a.weight[unit]) : 1) * inv;
    const T shift = T((a.bias ? double(a.bias[unit]) : 0) - mean * scale);
    const T* residual = a.residual ? a.residual + at : nullptr;
    const auto run = a.relu ? (residual ? normalise<T, true, true> : normalise<T, true, false>)
                            : (residual ? normalise<T, false, true> : normalise<T, false, false>);
    run(s, a.x + at, residual, a.y + at, T(scale), shift);
  }
}

// Sums over a channel of g and of g (x - mean), where g is the gradient that passes the ReLU.
template <class T, bool Relu>
void sums(const ChannelShape& s, const T* x, const T* y, const T* grad, T mean, double& first, double& second) {
  first = second = 0;
  for (int64_t r = 0; r < s.repeats; ++r)
    for (int64_t begin = 0; begin < s.length; begin += kBlock) {
      const int64_t at = r * s.channels * s.length + begin;
      const int64_t n = s.length - begin < kBlock ? s.length - begin : kBlock;
      V<T> one[2] = {}, two[2] = {};
      for_vectors<T>(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        V<T> g = get(grad + at + i, count);
        if (Relu) g = where_positive<T>(g, get(y + at + i, count));
        const int k = i / Lanes<T>::count & 1;
        one[k] += g;
        two[k] += g * (get(x + at + i, count) - mean);
      });
      first += total<T>(one[0] + one[1]);
      second += total<T>(two[0] + two[1]);
    }
}

template <class T, bool Relu>
void input_gradient(const ChannelShape& s, const T* x, const T* y, const T* grad, T* x_grad, T* residual_grad, T scale,
                    T slope, T shift) {
  for (int64_t r = 0; r < s.repeats; ++r) {
    const int64_t at = r * s.channels * s.length;
    for_vectors<T>(s.length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      V<T> g = get(grad + at + i, count);
      if (Relu) g = where_positive<T>(g, get(y + at + i, count));
      if (residual_grad) put(residual_grad + at + i, g, count);
      put(x_grad + at + i, g * scale + (get(x + at + i, count) * slope + shift), count);
    });
  }
}

template <class T>
void backward(const ChannelShape& s, const BatchNormBackward<T>& a, int64_t begin, int64_t end) {
  const double count = double(s.repeats * s.length);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t branch = unit / s.channels, c = unit % s.channels;
    const int64_t at = (branch * s.repeats * s.channels + c) * s.length;
    const T* y = a.relu ? a.y + at : nullptr;
    const double mean = double(a.mean[unit]), inv = double(a.inv[unit]);
    double first, second;
    (a.relu ? sums<T, true> : sums<T, false>)(s, a.x + at, y, a.grad + at, a.mean[unit], first, second);
    a.bias_grad[unit] = T(first);
    a.weight_grad[unit] = T(second * inv);
    // dx = weight inv (g - first / n - (x - mean) inv^2 second / n), as scale g + slope x + shift.
    const double scale = (a.weight ? double(a.weight[unit]) : 1) * inv;
    const double slope = -scale * inv * inv * second / count;
    const double shift = -scale * first / count - slope * mean;
    const auto run = a.relu ? input_gradient<T, true> : input_gradient<T, false>;
    run(s, a.x + at, y, a.grad + at, a.x_grad + at, a.residual_grad ? a.residual_grad + at : nullptr, T(scale),
        T(slope), T(shift));
  }
}

}  // namespace

template <class T>
BatchNorm<T> batch_norm() {
  return {forward<T>, backward<T>};
}
template BatchNorm<float> batch_norm<float>();
template BatchNorm<double> batch_norm<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
