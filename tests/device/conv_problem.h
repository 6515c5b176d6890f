// Random convolutions of small shapes with their sums in double, from the numbers as stored, by plain loops.
#pragma once

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cuda/device.cuh"
#include "emulation/block.h"
#include "expect.h"
#include "shape.h"

namespace bsfast::test {

using emulation::Order;

constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::random};

// Rounding error of storage, relative.
template <class T>
double storage_epsilon();
template <>
inline double storage_epsilon<float>() {
  return 0x1p-24;
}
template <>
inline double storage_epsilon<Half>() {
  return 0x1p-11;
}
template <>
inline double storage_epsilon<BFloat16>() {
  return 0x1p-8;
}

template <class T>
const char* storage_name();
template <>
inline const char* storage_name<float>() {
  return "float";
}
template <>
inline const char* storage_name<Half>() {
  return "half";
}
template <>
inline const char* storage_name<BFloat16>() {
  return "bfloat16";
}

// A sum in double, what a float sum in any order may be wrong by, and the number of terms.
struct Sum {
  double value = 0, magnitude = 0;
  int64_t terms = 0;
  void add(double product) {
    value += product;
    magnitude += std::fabs(product);
    ++terms;
  }
};

// Elements [first, first + sums.size()) of a result must equal their sums, up to the rounding of a float sum and that
// of storage.
template <class T>
void expect_sums(const T* result, const std::vector<Sum>& sums, const std::string& what) {
  for (size_t i = 0; i < sums.size(); ++i) {
    const double got = double(to_float(result[i])), bound = double(sums[i].terms) * 0x1p-24 * sums[i].magnitude;
    const double error = std::fabs(got - sums[i].value);
    if (!(error <= bound + storage_epsilon<T>() * (std::fabs(sums[i].value) + bound) + 0x1p-25))
      return expect(false, what + ": element " + std::to_string(i) + " is " + std::to_string(got) + ", must be " +
                               std::to_string(sums[i].value));
  }
}

// Every multiply-add of a convolution: add(index in x, in weight, in the output, sample).
template <class Add>
void each_product(const ConvShape& s, Add add) {
  const int64_t height = s.out_size(0), width = s.out_size(1), outs = s.groups * s.out_channels;
  for (int64_t m = 0; m < s.branches; ++m)
    for (int64_t o = 0; o < outs; ++o)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x)
          for (int64_t c = 0; c < s.in_channels; ++c)
            for (int64_t i = 0; i < s.kernel[0]; ++i)
              for (int64_t j = 0; j < s.kernel[1]; ++j) {
                const int64_t row = y * s.stride[0] + i * s.dilation[0] - s.padding[0];
                const int64_t column = x * s.stride[1] + j * s.dilation[1] - s.padding[1];
                if (row < 0 || row >= s.size[0] || column < 0 || column >= s.size[1]) continue;
                const int64_t channel = ((s.shared_input ? 0 : m) * s.groups + o / s.out_channels) * s.in_channels + c;
                const int64_t source = ((channel * s.size[0] + row) * s.size[1] + column) * s.samples;
                const int64_t target = (((m * outs + o) * height + y) * width + x) * s.samples;
                const int64_t weight = (((m * outs + o) * s.in_channels + c) * s.kernel[0] + i) * s.kernel[1] + j;
                for (int64_t n = 0; n < s.samples; ++n) add(source + n, weight, target + n);
              }
}

template <class T>
struct Problem {
  ConvShape s;
  Memory<T> x, weight, y;  // y is the gradient of the output, too
  std::vector<Sum> x_sums, weight_sums, y_sums;

  explicit Problem(const ConvShape& s)
      : s(s),
        x((s.shared_input ? 1 : s.branches) * s.groups * s.in_channels * s.size[0] * s.size[1] * s.samples),
        weight(s.branches * s.weights()),
        y(s.branches * s.groups * s.out_channels * s.out_size(0) * s.out_size(1) * s.samples),
        x_sums(size_t(x.count)),
        weight_sums(size_t(weight.count)),
        y_sums(size_t(y.count)) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (Memory<T>* memory : {&x, &weight, &y})
      for (int64_t i = 0; i < memory->count; ++i) from_float(normal(random), memory->data[i]);
    each_product(s, [&](int64_t xi, int64_t wi, int64_t yi) {
      const double xv = to_float(x.data[xi]), wv = to_float(weight.data[wi]), yv = to_float(y.data[yi]);
      y_sums[size_t(yi)].add(xv * wv);
      x_sums[size_t(xi)].add(yv * wv);
      weight_sums[size_t(wi)].add(xv * yv);
    });
  }

  int64_t channel_elements() const { return s.out_size(0) * s.out_size(1) * s.samples; }
};

inline std::string describe(const ConvShape& s) {
  const auto pair = [](const int64_t* of) { return std::to_string(of[0]) + "x" + std::to_string(of[1]); };
  return "M=" + std::to_string(s.branches) + " N=" + std::to_string(s.samples) + ", " + std::to_string(s.groups) +
         " groups of " + std::to_string(s.in_channels) + " to " + std::to_string(s.out_channels) + " channels, " +
         pair(s.size) + ", kernel " + pair(s.kernel) + ", stride " + pair(s.stride);
}

// M, repeats, N, groups, C_in, C_out, size, kernel, stride, padding, dilation, shared input
inline const ConvShape kShapes[] = {
    {1, 1, 1, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false},
    {2, 1, 16, 1, 3, 8, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
    {3, 1, 17, 1, 2, 9, {5, 4}, {3, 3}, {1, 1}, {1, 0}, {1, 1}, false},  // odd N
    {2, 1, 34, 1, 6, 6, {6, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
    {1, 1, 66, 1, 12, 12, {3, 9}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
    {1, 1, 2, 1, 20, 3, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},   // more steps than fit shared memory
    {1, 1, 4, 1, 40, 2, {3, 3}, {2, 2}, {1, 1}, {0, 1}, {1, 1}, false},   // and tap by tap
    {2, 1, 33, 1, 5, 3, {1, 1}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},   // all but one tap in the padding
    {2, 1, 6, 1, 2, 4, {2, 3}, {3, 3}, {1, 1}, {2, 3}, {1, 1}, true},     // padding beyond the kernel
    {2, 1, 30, 1, 4, 17, {6, 2}, {3, 3}, {2, 2}, {1, 2}, {1, 1}, false},  // strides
    {2, 1, 18, 1, 2, 6, {5, 4}, {1, 1}, {2, 3}, {0, 0}, {1, 1}, false},   // most of the input is not read
    {2, 1, 10, 1, 3, 12, {8, 9}, {3, 2}, {2, 3}, {4, 2}, {3, 2}, false},  // dilation
    {1, 1, 10, 1, 2, 3, {9, 9}, {3, 3}, {4, 2}, {1, 1}, {2, 4}, false},   // that shares factors with the stride
    {2, 1, 20, 1, 3, 13, {7, 8}, {2, 4}, {3, 2}, {0, 3}, {2, 1}, true},   // shared input
    {3, 1, 8, 1, 3, 6, {5, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true},
    {2, 1, 20, 3, 2, 5, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // groups
    {2, 1, 16, 5, 1, 1, {4, 5}, {3, 3}, {2, 1}, {1, 1}, {1, 1}, true},   // depthwise, shared input
    {1, 1, 6, 1, 2, 4, {1, 2}, {5, 3}, {1, 1}, {2, 4}, {1, 1}, false},   // kernel larger than the image
    {1, 1, 130, 1, 2, 2, {2, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
};

}  // namespace bsfast::test
