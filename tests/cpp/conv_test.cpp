// The convolution kernels of every instruction set of this host against plain loops, without torch.
#include <cmath>
#include <cstdio>
#include <limits>

#include "conv_problem.h"
#include "cpu/conv_gather.h"
#include "cpu/conv_sample_grad.h"
#include "cpu/conv_weight_grad.h"

namespace {

using bsfast::Isa;

// Largest error of a result, in machine epsilons times the number of terms (products of standard normals).
template <class T>
double error_of(const T* result, const Sums& truth) {
  double worst = 0;
  for (size_t i = 0; i < truth.value.size(); ++i) {
    const double bound = std::numeric_limits<T>::epsilon() * (truth.terms[i] + 1e-9);
    const double error = std::fabs(double(result[i]) - truth.value[i]) / bound;
    if (!(error <= worst)) worst = error;
    if (std::isnan(worst)) break;
  }
  return worst;
}

template <class T>
double convolution(const Problem<T>& p, Isa isa, int64_t workers) {
  const auto kernel = bsfast::gather<T>(isa);
  const bsfast::GatherPlan plan(p.s, false);
  Memory<T> out(p.y.count, sizeof(void*));
  share(kernel.units(plan), kernel.scratch_bytes(plan), workers, [&](void* scratch, int64_t begin, int64_t end) {
    kernel.run(plan, {p.x.data, p.weight.data, out.data, {}, {}}, scratch, begin, end);
  });
  return error_of(out.data, p.y_sums);
}

template <class T>
double input_grad(const Problem<T>& p, Isa isa, int64_t workers) {
  ConvShape s = p.s;
  if (s.shared_input) {  // as ops.cpp: the channels of all branches are those of one
    if (s.groups > 1 || s.repeats > 1) return 0;
    s.out_channels *= s.branches;
    s.branches = 1;
    s.shared_input = false;
  }
  const auto kernel = bsfast::gather<T>(isa);
  const bsfast::GatherPlan plan(s, true);
  Memory<T> out(p.x.count, sizeof(void*));
  share(kernel.units(plan), kernel.scratch_bytes(plan), workers, [&](void* scratch, int64_t begin, int64_t end) {
    kernel.run(plan, {p.y.data, p.weight.data, out.data, {}, {}}, scratch, begin, end);
  });
  return error_of(out.data, p.x_sums);
}

template <class T>
double weight_grad(const Problem<T>& p, Isa isa, int64_t workers, bool patches) {
  if (patches && p.s.dilation[1] != 1) return 0;
  const auto kernel = patches ? bsfast::weight_grad_patches<T>(isa) : bsfast::weight_grad<T>(isa);
  const bsfast::WeightGradPlan plan(p.s);
  const int64_t parts = kernel.parts(plan);
  Memory<T> partial(parts * p.weight.count, sizeof(void*));
  share(kernel.units(plan), kernel.scratch_bytes(plan), workers, [&](void* scratch, int64_t begin, int64_t end) {
    kernel.run(plan, p.x.data, {}, p.y.data, partial.data, scratch, begin, end);
  });
  for (int64_t i = p.weight.count; i < partial.count; ++i) partial.data[i % p.weight.count] += partial.data[i];
  return error_of(partial.data, p.weight_sums);
}

// With two seeds: the gradient of the output, and twice that.
template <class T>
double sample_grad(const Problem<T>& p, Isa isa, int64_t workers) {
  const int64_t samples = p.s.samples;
  if (p.s.repeats > 1) return 0;  // batch-last memory only
  const auto kernel = bsfast::sample_grad<T>(isa);
  const bsfast::SampleGradPlan plan{p.s, 2};
  Memory<T> seeds(2 * p.y.count, sizeof(void*)), out(2 * p.weight.count * samples, sizeof(void*));
  for (int64_t i = 0; i < seeds.count; ++i) {
    const int64_t seed = i / samples % 2;
    seeds.data[i] = p.y.data[i / samples / 2 * samples + i % samples] * T(seed + 1);
  }
  share(kernel.units(plan), kernel.scratch_bytes(plan), workers, [&](void* scratch, int64_t begin, int64_t end) {
    kernel.run(plan, p.x.data, seeds.data, out.data, scratch, begin, end);
  });
  double worst = 0;
  for (int64_t seed = 0; seed < 2; ++seed) {
    Memory<T> own(p.weight.count * samples, sizeof(void*));
    for (int64_t i = 0; i < own.count; ++i)
      own.data[i] = out.data[(i / samples * 2 + seed) * samples + i % samples] / T(seed + 1);
    const double error = error_of(own.data, p.sample_sums);
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

template <class T>
int failures_of(const ConvShape& s) {
  const Problem<T> problem(s);
  int failures = 0;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa > bsfast::best_isa()) continue;
    for (int64_t workers : {1, 2, 5}) {
      const double errors[] = {convolution(problem, isa, workers), input_grad(problem, isa, workers),
                               weight_grad(problem, isa, workers, false), sample_grad(problem, isa, workers),
                               weight_grad(problem, isa, workers, true)};
      for (int i = 0; i < 5; ++i)
        if (!(errors[i] <= 4)) {
          ++failures;
          const char* names[] = {"convolution", "input gradient", "weight gradient", "per-sample weight gradient",
                                 "weight gradient by patches"};
          std::printf("%s on %s, %d bytes, %d workers: error %g\n", names[i], bsfast::isa_name(isa), int(sizeof(T)),
                      int(workers), errors[i]);
        }
    }
  }
  if (failures > 0)
    std::printf("... with M=%d, N=%d * %d, %d groups of %d to %d channels, %dx%d, kernel %dx%d\n", int(s.branches),
                int(s.repeats), int(s.samples), int(s.groups), int(s.in_channels), int(s.out_channels), int(s.size[0]),
                int(s.size[1]), int(s.kernel[0]), int(s.kernel[1]));
  return failures;
}

}  // namespace

int main() {
  const ConvShape cases[] = {
      // M, repeats, samples, groups, C_in, C_out, size, kernel, stride, padding, dilation, shared
      {1, 1, 1, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false},
      {2, 1, 16, 1, 3, 8, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
      {3, 1, 17, 1, 2, 9, {5, 4}, {3, 3}, {1, 1}, {1, 0}, {1, 1}, false},
      {2, 1, 33, 1, 5, 3, {1, 1}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
      {2, 1, 5, 1, 2, 4, {2, 3}, {3, 3}, {1, 1}, {2, 3}, {1, 1}, true},
      {1, 1, 40, 1, 70, 2, {3, 33}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},   // chunks of samples
      {1, 1, 35, 1, 2, 70, {3, 66}, {3, 3}, {1, 2}, {1, 1}, {1, 1}, false},   // and in the gradient of the input
      {2, 1, 3, 1, 90, 2, {4, 220}, {5, 1}, {1, 1}, {2, 0}, {1, 1}, false},   // fewer samples than lanes
      {2, 1, 31, 1, 4, 17, {6, 2}, {3, 3}, {2, 2}, {1, 2}, {1, 1}, false},    // strides
      {2, 1, 18, 1, 2, 6, {5, 4}, {1, 1}, {2, 3}, {0, 0}, {1, 1}, false},     // most of the input is not read
      {3, 1, 9, 1, 3, 12, {8, 9}, {3, 2}, {2, 3}, {4, 2}, {3, 2}, false},     // dilation
      {2, 1, 19, 1, 3, 13, {7, 8}, {2, 4}, {3, 2}, {0, 3}, {2, 1}, true},     // shared input
      {2, 1, 20, 3, 2, 5, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},     // groups
      {2, 1, 17, 5, 1, 1, {4, 5}, {3, 3}, {2, 1}, {1, 1}, {1, 1}, true},      // depthwise, shared input
      {3, 4, 1, 2, 3, 7, {5, 18}, {3, 5}, {1, 1}, {1, 2}, {1, 1}, false},     // contiguous
      {2, 5, 1, 1, 4, 8, {9, 35}, {3, 3}, {2, 3}, {1, 0}, {1, 2}, false},     // with strides
      {2, 3, 1, 1, 3, 6, {6, 17}, {2, 3}, {1, 2}, {1, 1}, {1, 1}, true},      // and shared input
      {1, 20, 1, 1, 2, 4, {1, 2}, {5, 3}, {1, 1}, {2, 4}, {1, 1}, false},     // kernel larger than the image
      {1, 1, 130, 1, 8, 9, {3, 20}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}};  // blocks of a line
  int failures = 0;
  for (const ConvShape& s : cases) failures += failures_of<float>(s) + failures_of<double>(s);
  std::printf("%d failures on %s\n", failures, bsfast::isa_name(bsfast::best_isa()));
  return failures != 0;
}
