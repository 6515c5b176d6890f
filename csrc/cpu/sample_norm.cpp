// Normalisation of samples over the vector width, compiled per instruction set.
#include "cpu/sample_norm.h"

#include "cpu/sample_norm_columns.h"
#include "cpu/sample_norm_run.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

template <class T>
int64_t units(const SampleNormShape& s) {
  const int64_t wide = kSums * Lanes<T>::count;
  return s.branches * s.groups * (s.batch_last ? ceil_div(s.samples, wide) : s.samples);
}

// Calls body(columns) for the columns of a batch-last unit: wide ones, or single vectors at the end.
template <class T, class Body>
void for_columns(const SampleNormShape& s, int64_t unit, Body body) {
  constexpr int64_t L = Lanes<T>::count, wide = kSums * L;
  const int64_t chunks = ceil_div(s.samples, wide), group = unit / chunks;
  int64_t sample = unit % chunks * wide;
  if (s.samples - sample >= wide) return body(Columns<T, kSums>{s, group, sample, L});
  for (; sample < s.samples; sample += L)
    body(Columns<T, 1>{s, group, sample, s.samples - sample < L ? s.samples - sample : L});
}

template <class T>
void forward(const SampleNormShape& s, const SampleNormForward<T>& a, int64_t begin, int64_t end) {
  const bool active = a.slope != 1;
  for (int64_t unit = begin; unit < end; ++unit)
    if (s.batch_last)
      for_columns<T>(s, unit, [&](const auto& columns) {
        active ? columns.template forward<true>(a) : columns.template forward<false>(a);
      });
    else
      (active ? forward_run<T, true> : forward_run<T, false>)(s, a, unit);
}

template <class T>
void backward(const SampleNormShape& s, const SampleNormBackward<T>& a, int64_t begin, int64_t end) {
  const bool active = a.slope != 1;
  for (int64_t unit = begin; unit < end; ++unit)
    if (s.batch_last)
      for_columns<T>(s, unit, [&](const auto& columns) {
        active ? columns.template backward<true>(a) : columns.template backward<false>(a);
      });
    else
      (active ? backward_run<T, true> : backward_run<T, false>)(s, a, unit);
}

}  // namespace

template <class T>
SampleNorm<T> sample_norm() {
  return {units<T>, forward<T>, backward<T>};
}
template SampleNorm<float> sample_norm<float>();
template SampleNorm<double> sample_norm<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
