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
  return condition <= V<T>{} ? V<T>{} : value;  // as ReLU keeps what is not a number
}

// Whether a result that begins here is stored past the caches: if it is large, and all its vectors are whole and
// aligned.
template <class T>
bool passes_caches(const ChannelShape& s, const T* result) {
  const int64_t count = s.units() * s.repeats * s.length;
  const bool aligned = reinterpret_cast<uintptr_t>(result) % kVectorBytes == 0 && s.length % Lanes<T>::count == 0;
  return aligned && count * int64_t(sizeof(T)) > kStreamBytes;
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

template <class T, bool Stream>
inline __attribute__((always_inline)) void put(T* to, V<T> value, int64_t count) {
  if (Stream) return stream(to, value);
  if (count == Lanes<T>::count) return store(to, value);
  store_some(to, count, value);
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

template <class T, bool Relu, bool Residual, bool Stream>
void normalise(const ChannelShape& s, const T* x, const T* residual, T* y, T scale, T shift) {
  for (int64_t r = 0; r < s.repeats; ++r) {
    const int64_t at = r * s.channels * s.length;
    for_vectors<T>(s.length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      V<T> value = get(x + at + i, count) * scale + shift;
      if (Residual) value += get(residual + at + i, count);
      if (Relu) value = rectified<T>(value);
      put<T, Stream>(y + at + i, value, count);
    });
  }
}

template <class T, bool Relu, bool Residual>
auto normaliser(bool past_caches) {
  return past_caches ? normalise<T, Relu, Residual, true> : normalise<T, Relu, Residual, false>;
}

template <class T>
void forward(const ChannelShape& s, const BatchNormForward<T>& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t branch = unit / s.channels, c = unit % s.channels;
    const int64_t at = (branch * s.repeats * s.channels + c) * s.length;
    double mean = double(a.mean[unit]), variance = double(a.variance[unit]);
    if (!a.known) statistics(s, a.x + at, mean, variance);
    const double inv = 1 / std::sqrt(variance + a.eps);
    a.mean[unit] = T(mean);
    a.inv[unit] = T(inv);
    a.variance[unit] = T(variance);
    const double scale = (a.weight ? double(a.weight[unit]) : 1) * inv;
    a.scale[unit] = T(scale);
    a.shift[unit] = T((a.bias ? double(a.bias[unit]) : 0) - mean * scale);
    if (a.y == nullptr) continue;
    const T* residual = a.residual ? a.residual + at : nullptr;
    const bool past = passes_caches(s, a.y);
    const auto run = a.relu ? (residual ? normaliser<T, true, true>(past) : normaliser<T, true, false>(past))
                            : (residual ? normaliser<T, false, true>(past) : normaliser<T, false, false>(past));
    run(s, a.x + at, residual, a.y + at, a.scale[unit], a.shift[unit]);
  }
  stream_fence();
}

// Which gradients pass: all, those where y > 0, or those where scale x + shift > 0.
enum class Mask { none, result, input };

template <class T, Mask mask>
struct Gradient {
  const T *x, *y, *grad;  // of a channel
  T scale, shift;

  // The gradient behind the ReLU at some elements, whose x is given.
  inline __attribute__((always_inline)) V<T> operator()(int64_t at, int64_t count, V<T> x_here) const {
    const V<T> g = get(grad + at, count);
    if (mask == Mask::none) return g;
    return where_positive<T>(g, mask == Mask::result ? get(y + at, count) : x_here * scale + shift);
  }
};

// Sums over a channel of g and of g (x - mean).
template <class T, Mask mask>
void sums(const ChannelShape& s, const Gradient<T, mask>& gradient, T mean, double& first, double& second) {
  first = second = 0;
  for (int64_t r = 0; r < s.repeats; ++r)
    for (int64_t begin = 0; begin < s.length; begin += kBlock) {
      const int64_t at = r * s.channels * s.length + begin;
      const int64_t n = s.length - begin < kBlock ? s.length - begin : kBlock;
      V<T> one[2] = {}, two[2] = {};
      for_vectors<T>(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        const V<T> x = get(gradient.x + at + i, count), g = gradient(at + i, count, x);
        const int k = i / Lanes<T>::count & 1;
        one[k] += g;
        two[k] += g * (x - mean);
      });
      first += total<T>(one[0] + one[1]);
      second += total<T>(two[0] + two[1]);
    }
}

template <class T, Mask mask, bool Stream>
void input_gradient(const ChannelShape& s, const Gradient<T, mask>& gradient, T* x_grad, T* residual_grad, T scale,
                    T slope, T shift) {
  for (int64_t r = 0; r < s.repeats; ++r) {
    const int64_t at = r * s.channels * s.length;
    for_vectors<T>(s.length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      const V<T> x = get(gradient.x + at + i, count), g = gradient(at + i, count, x);
      if (residual_grad) put<T, Stream>(residual_grad + at + i, g, count);
      put<T, Stream>(x_grad + at + i, g * scale + (x * slope + shift), count);
    });
  }
}

template <class T, Mask mask>
void channel_backward(const ChannelShape& s, const BatchNormBackward<T>& a, int64_t unit) {
  const int64_t branch = unit / s.channels, c = unit % s.channels;
  const int64_t at = (branch * s.repeats * s.channels + c) * s.length;
  const Gradient<T, mask> gradient{a.x + at, a.y ? a.y + at : nullptr, a.grad + at, a.scale[unit], a.shift[unit]};
  const double mean = double(a.mean[unit]), inv = double(a.inv[unit]), count = double(s.repeats * s.length);
  double first, second;
  sums<T, mask>(s, gradient, a.mean[unit], first, second);
  a.bias_grad[unit] = T(first);
  a.weight_grad[unit] = T(second * inv);
  // dx = weight inv (g - first / n - (x - mean) inv^2 second / n), as scale g + slope x + shift.
  const double scale = double(a.scale[unit]);
  const double slope = -scale * inv * inv * second / count;
  const double shift = -scale * first / count - slope * mean;
  const bool in_place = a.x_grad == a.grad, residual_past = !a.residual_grad || passes_caches(s, a.residual_grad);
  const bool past = !in_place && residual_past && passes_caches(s, a.x_grad);
  const auto run = past ? input_gradient<T, mask, true> : input_gradient<T, mask, false>;
  run(s, gradient, a.x_grad + at, a.residual_grad ? a.residual_grad + at : nullptr, T(scale), T(slope), T(shift));
}

template <class T>
void backward(const ChannelShape& s, const BatchNormBackward<T>& a, int64_t begin, int64_t end) {
  const auto run = !a.relu ? channel_backward<T, Mask::none>
                           : (a.y ? channel_backward<T, Mask::result> : channel_backward<T, Mask::input>);
  for (int64_t unit = begin; unit < end; ++unit) run(s, a, unit);
  stream_fence();
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
