#include "cpu/axis.h"

#include <algorithm>

namespace bsfast {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace

Axis::Axis(int64_t source, int64_t target, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
           bool transposed)
    : source(source), target(target), phases(transposed ? 1 : stride), classes(transposed ? stride : 1) {
  Tap* tap = new Tap[kernel];
  int64_t* start = new int64_t[classes + 1];
  taps = tap;
  first = start;
  for (int64_t residue = 0; residue < classes; ++residue) {
    *start++ = tap - taps;
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t at = transposed ? residue + padding - dilation * k : dilation * k - padding;
      const int64_t shift = floor_div(at, stride), rest = at - shift * stride;
      if (!transposed || rest == 0) *tap++ = {k, shift, rest};
    }
  }
  *start = tap - taps;
  const auto by_shift = [](const Tap& a, const Tap& b) { return a.shift < b.shift; };
  low = std::min_element(taps, taps + kernel, by_shift)->shift;
  high = std::max_element(taps, taps + kernel, by_shift)->shift;
}

Axis::~Axis() {
  delete[] taps;
  delete[] first;
}

}  // namespace bsfast
