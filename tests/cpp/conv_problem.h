// A convolution with random operands and its products summed by plain loops in double, for the tests of kernels. All
// memory is allocated in its exact size, so that a sanitizer sees an access beyond it; work is split unevenly, as
// parallel_for may.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "shape.h"

namespace {

using bsfast::ConvShape;

// Exact number of elements, NaN at first, at an address that is a multiple of `alignment`, but of no more.
template <class T>
struct Memory {
  T* data;
  int64_t count;
  Memory(int64_t count, size_t alignment) : count(count) {
    void* p = nullptr;
    if (posix_memalign(&p, alignment, size_t(count) * sizeof(T)) != 0) std::abort();
    data = static_cast<T*>(p);
    for (int64_t i = 0; i < count; ++i) data[i] = std::numeric_limits<T>::quiet_NaN();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

// Every multiply-add of a convolution: add(index in x, in weight, in the output).
template <class Add>
void each_product(const ConvShape& s, Add add) {
  const int64_t height = s.out_size(0), width = s.out_size(1);
  for (int64_t m = 0; m < s.branches; ++m)
    for (int64_t r = 0; r < s.repeats; ++r)
      for (int64_t o = 0; o < s.groups * s.out_channels; ++o)
        for (int64_t h = 0; h < height; ++h)
          for (int64_t w = 0; w < width; ++w)
            for (int64_t c = 0; c < s.in_channels; ++c)
              for (int64_t i = 0; i < s.kernel[0]; ++i)
                for (int64_t j = 0; j < s.kernel[1]; ++j) {
                  const int64_t row = h * s.stride[0] + i * s.dilation[0] - s.padding[0];
                  const int64_t column = w * s.stride[1] + j * s.dilation[1] - s.padding[1];
                  if (row < 0 || row >= s.size[0] || column < 0 || column >= s.size[1]) continue;
                  const int64_t image = s.shared_input ? r : m * s.repeats + r;
                  const int64_t channel = image * s.groups * s.in_channels + o / s.out_channels * s.in_channels + c;
                  const int64_t x = ((channel * s.size[0] + row) * s.size[1] + column) * s.samples;
                  const int64_t target = m * s.repeats + r;
                  const int64_t y = (((target * s.groups * s.out_channels + o) * height + h) * width + w) * s.samples;
                  const int64_t tap = i * s.kernel[1] + j;
                  const int64_t weight = ((m * s.groups * s.out_channels + o) * s.in_channels + c) * s.taps() + tap;
                  for (int64_t n = 0; n < s.samples; ++n) add(x + n, weight, y + n);
                }
}

// Sums of products and the number of their terms.
struct Sums {
  std::vector<double> value;
  std::vector<int> terms;
  explicit Sums(int64_t count) : value(size_t(count)), terms(size_t(count)) {}
  void add(int64_t at, double product) {
    value[size_t(at)] += product;
    ++terms[size_t(at)];
  }
};

template <class T>
struct Problem {
  const ConvShape& s;
  Memory<T> x, weight, y;
  Sums x_sums, weight_sums, sample_sums, y_sums;

  explicit Problem(const ConvShape& s)
      : s(s),
        x((s.shared_input ? 1 : s.branches) * images(s, s.in_channels) * s.size[0] * s.size[1], sizeof(void*)),
        weight(s.branches * s.weights(), sizeof(void*)),
        y(s.branches * images(s, s.out_channels) * s.out_size(0) * s.out_size(1), sizeof(void*)),
        x_sums(x.count),
        weight_sums(weight.count),
        sample_sums(weight.count * s.samples),
        y_sums(y.count) {
    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    for (Memory<T>* memory : {&x, &weight, &y})
      for (int64_t i = 0; i < memory->count; ++i) memory->data[i] = T(normal(random));
    each_product(s, [&](int64_t xi, int64_t wi, int64_t yi) {
      y_sums.add(yi, double(x.data[xi]) * double(weight.data[wi]));
      x_sums.add(xi, double(y.data[yi]) * double(weight.data[wi]));
      weight_sums.add(wi, double(x.data[xi]) * double(y.data[yi]));
      sample_sums.add(wi * s.samples + yi % s.samples, double(x.data[xi]) * double(y.data[yi]));
    });
  }

  static int64_t images(const ConvShape& s, int64_t channels) { return s.repeats * s.groups * channels * s.samples; }
};

// Runs the units of a kernel as uneven shares of some workers, each with its own scratch.
template <class Run>
void share(int64_t units, size_t scratch_bytes, int64_t workers, Run run) {
  for (int64_t worker = 0; worker < workers; ++worker) {
    const int64_t begin = units * worker * worker / (workers * workers);
    const int64_t end = units * (worker + 1) * (worker + 1) / (workers * workers);
    Memory<unsigned char> scratch(int64_t(scratch_bytes), 64);
    for (int64_t i = 0; i < scratch.count; ++i) scratch.data[i] = 0xff;  // NaN, and no row of an image
    if (begin < end) run(scratch.data, begin, end);
  }
}

}  // namespace
