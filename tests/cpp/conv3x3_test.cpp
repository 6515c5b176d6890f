// The 3x3 kernel of every instruction set of this host against seven plain loops, without torch. All memory is
// allocated in its exact size, so that a sanitizer sees an access beyond it; work is split unevenly, as parallel_for
// may.
#include "cpu/conv3x3.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using bsfast::ConvShape;

// Exact number of bytes at an address that is a multiple of `alignment`, but of no more.
template <class T>
struct Memory {
  T* data;
  Memory(size_t count, T value, size_t alignment) {
    void* p = nullptr;
    if (posix_memalign(&p, alignment, count * sizeof(T)) != 0) std::abort();
    data = static_cast<T*>(p);
    for (size_t i = 0; i < count; ++i) data[i] = value;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

template <class T>
double reference(const ConvShape& s, const T* x, const T* weight, int64_t m, int64_t o, int64_t h, int64_t w,
                 int64_t n) {
  double sum = 0;
  for (int64_t c = 0; c < s.in_channels; ++c)
    for (int64_t kh = 0; kh < 3; ++kh)
      for (int64_t kw = 0; kw < 3; ++kw) {
        const int64_t row = h + kh - s.pad_height, column = w + kw - s.pad_width;
        if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
        const int64_t branch = s.shared_input ? 0 : m;
        sum += double(x[(((branch * s.in_channels + c) * s.height + row) * s.width + column) * s.samples + n]) *
               double(weight[(((m * s.out_channels + o) * s.in_channels + c) * 3 + kh) * 3 + kw]);
      }
  return sum;
}

// Largest error of one case, in machine epsilons times the length of its sums of products of standard normals.
template <class T>
double error_of(const ConvShape& s, bsfast::Isa isa, int64_t workers) {
  const auto kernel = bsfast::conv3x3<T>(isa);
  const int64_t inputs = (s.shared_input ? 1 : s.branches) * s.in_channels * s.height * s.width * s.samples;
  const int64_t weights = s.branches * s.out_channels * s.in_channels * 9;
  const int64_t outputs = s.branches * s.out_channels * s.out_height() * s.out_width() * s.samples;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Memory<T> x(inputs, nan, sizeof(void*)), weight(weights, nan, sizeof(void*)), y(outputs, nan, sizeof(void*));
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < inputs; ++i) x.data[i] = T(normal(random));
  for (int64_t i = 0; i < weights; ++i) weight.data[i] = T(normal(random));
  const int64_t rows = kernel.rows(s);
  for (int64_t worker = 0; worker < workers; ++worker) {
    Memory<T> scratch(kernel.scratch_size(s), nan, 64);
    kernel.run(s, x.data, weight.data, y.data, scratch.data, rows * worker / workers, rows * (worker + 1) / workers);
  }
  double worst = 0;
  const T* out = y.data;
  for (int64_t m = 0; m < s.branches; ++m)
    for (int64_t o = 0; o < s.out_channels; ++o)
      for (int64_t h = 0; h < s.out_height(); ++h)
        for (int64_t w = 0; w < s.out_width(); ++w)
          for (int64_t n = 0; n < s.samples; ++n, ++out) {
            const double error = std::fabs(double(*out) - reference(s, x.data, weight.data, m, o, h, w, n));
            if (!(error <= worst)) worst = error;  // NaN, too
            if (std::isnan(worst)) return worst;
          }
  return worst / std::numeric_limits<T>::epsilon() / (9.0 * double(s.in_channels));
}

}  // namespace

int main() {
  //                        M  N   C_in C_out H  W   pads  shared
  const ConvShape cases[] = {{1, 1, 1, 1, 3, 3, 0, 0, false},   {2, 16, 3, 8, 4, 5, 1, 1, false},
                             {3, 17, 2, 9, 5, 4, 1, 0, false},  {2, 33, 5, 3, 1, 1, 1, 1, false},
                             {2, 5, 2, 4, 2, 3, 2, 3, true},    {1, 40, 70, 2, 3, 33, 1, 1, false},
                             {2, 31, 4, 17, 6, 2, 0, 2, false}, {4, 8, 3, 5, 7, 7, 1, 1, true}};
  int failures = 0;
  for (const ConvShape& s : cases)
    for (bsfast::Isa isa : {bsfast::Isa::baseline, bsfast::Isa::avx2, bsfast::Isa::avx512}) {
      if (isa > bsfast::best_isa()) continue;
      for (int64_t workers : {1, 2, 5}) {
        const double errors[] = {error_of<float>(s, isa, workers), error_of<double>(s, isa, workers)};
        for (double error : errors)
          if (!(error <= 4)) {
            ++failures;
            std::printf("%s, %d workers, M=%d N=%d %d to %d channels, %dx%d: error %g\n", bsfast::isa_name(isa),
                        int(workers), int(s.branches), int(s.samples), int(s.in_channels), int(s.out_channels),
                        int(s.height), int(s.width), error);
          }
      }
    }
  std::printf("%d failures on %s\n", failures, bsfast::isa_name(bsfast::best_isa()));
  return failures != 0;
}
