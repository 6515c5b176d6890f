// Winograd's kernels of every instruction set of this host, both tiles, against plain loops and, for what is done
// around a convolution, against the direct kernel; without torch.
#include "cpu/winograd.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "conv_problem.h"
#include "cpu/conv_gather.h"
#include "cpu/winograd_weight_grad.h"

namespace {

using bsfast::Isa;

// Of sums of products of standard normals; grows with the tile's points and hardly with the number of terms.
template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 2e-14;

template <class T, class Truth>
double relative_error(const T* result, const Truth* truth, size_t count) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < count; ++i) {
    error += std::pow(double(result[i]) - double(truth[i]), 2);
    norm += std::pow(double(truth[i]), 2);
  }
  return std::sqrt(error / (norm > 0 ? norm : 1));
}

template <class T>
double convolution(const Problem<T>& p, Isa isa, int tile, int64_t workers, bool transposed) {
  const auto kernel = bsfast::winograd<T>(isa);
  ConvShape s = p.s;
  if (transposed && s.shared_input) {  // the channels of all branches are those of one
    s.out_channels *= s.branches;
    s.branches = 1;
    s.shared_input = false;
  }
  const bsfast::WinogradPlan plan(s, transposed, tile);
  const Memory<T>&from = transposed ? p.y : p.x, &like = transposed ? p.x : p.y;
  Memory<T> out(like.count, sizeof(void*));
  share(kernel.units(plan), kernel.scratch_bytes(plan), workers, [&](void* scratch, int64_t begin, int64_t end) {
    kernel.run(plan, {from.data, p.weight.data, out.data, {}, {}}, scratch, begin, end);
  });
  return relative_error(out.data, (transposed ? p.x_sums : p.y_sums).value.data(), size_t(out.count));
}

// Also whether the result is the same for every number of workers, bit for bit.
template <class T>
double weight_grad(const Problem<T>& p, Isa isa, int tile, int64_t workers, std::vector<T>& first) {
  const auto kernel = bsfast::winograd_weight_grad<T>(isa);
  const bsfast::WinogradWeightGradPlan plan(p.s, tile);
  Memory<T> partial(kernel.parts(plan) * p.weight.count, sizeof(void*));
  share(kernel.units(plan), kernel.scratch_bytes(plan), workers, [&](void* scratch, int64_t begin, int64_t end) {
    kernel.run(plan, p.x.data, {}, p.y.data, partial.data, scratch, begin, end);
  });
  for (int64_t i = p.weight.count; i < partial.count; ++i) partial.data[i % p.weight.count] += partial.data[i];
  if (first.empty()) first.assign(partial.data, partial.data + p.weight.count);
  if (std::memcmp(first.data(), partial.data, first.size() * sizeof(T)) != 0) return 1;
  return relative_error(partial.data, p.weight_sums.value.data(), first.size());
}

// Scaled, shifted and rectified input, bias, residual and ReLU on the result, and its moments for each channel.
template <class T>
double around(const Problem<T>& p, Isa isa, int tile) {
  const ConvShape& s = p.s;
  if (s.shared_input) return 0;
  const auto direct = bsfast::gather<T>(isa);
  const auto kernel = bsfast::winograd<T>(isa);
  const bsfast::GatherPlan direct_plan(s, false);
  const bsfast::WinogradPlan plan(s, false, tile);
  const int64_t channels = s.groups * s.out_channels, slices = kernel.slices(plan);
  Memory<T> want(p.y.count, sizeof(void*)), out(p.y.count, sizeof(void*));
  const bsfast::Prologue<T> before{p.weight.data, p.weight.data + 1, true};
  const auto after = [&](bsfast::Moments* moments) {
    return bsfast::Epilogue<T>{p.weight.data + 1, p.weight.data + 2, p.y.data, true, p.y.data, moments};
  };
  share(direct.units(direct_plan), direct.scratch_bytes(direct_plan), 1, [&](void* scratch, int64_t b, int64_t e) {
    direct.run(direct_plan, {p.x.data, p.weight.data, want.data, before, after(nullptr)}, scratch, b, e);
  });
  std::vector<bsfast::Moments> moments(size_t(s.branches * s.repeats * channels * slices));
  share(kernel.units(plan), kernel.scratch_bytes(plan), 2, [&](void* scratch, int64_t b, int64_t e) {
    kernel.run(plan, {p.x.data, p.weight.data, out.data, before, after(moments.data())}, scratch, b, e);
  });
  double worst = relative_error(out.data, want.data, size_t(out.count));
  const int64_t plane = s.out_size(0) * s.out_size(1) * s.samples;
  for (int64_t c = 0; c < s.branches * s.repeats * channels; ++c) {
    double sum = 0, square = 0, own[3] = {};
    for (int64_t i = 0; i < plane; ++i) sum += double(out.data[c * plane + i]);
    for (int64_t i = 0; i < plane; ++i) square += std::pow(double(out.data[c * plane + i]) - sum / double(plane), 2);
    for (int64_t k = 0; k < slices; ++k) {
      const auto& m = moments[size_t((c / s.out_channels * slices + k) * s.out_channels + c % s.out_channels)];
      own[0] += m.count;
      own[1] += m.count * m.mean;
      own[2] += m.square + m.count * std::pow(m.mean - sum / double(plane), 2);
    }
    const double errors[] = {std::fabs(own[0] - double(plane)), std::fabs(own[1] - sum) / (1 + std::fabs(sum)),
                             std::fabs(own[2] - square) / (1 + square)};
    for (double error : errors)
      if (!(error / 10 <= worst)) worst = error / 10;  // moments are sums of many more terms
  }
  return worst;
}

template <class T>
int failures_of(const ConvShape& s, double& worst) {
  const Problem<T> problem(s);
  int failures = 0;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa > bsfast::best_isa()) continue;
    for (int tile : {2, 4}) {
      std::vector<T> first;
      for (int64_t workers : {1, 2, 5}) {
        const bool gradient = !s.shared_input || s.groups * s.repeats == 1;
        const double errors[] = {convolution(problem, isa, tile, workers, false),
                                 gradient ? convolution(problem, isa, tile, workers, true) : 0,
                                 weight_grad(problem, isa, tile, workers, first),
                                 workers == 1 ? around(problem, isa, tile) : 0};
        const char* names[] = {"convolution", "input gradient", "weight gradient", "prologue and epilogue"};
        for (int i = 0; i < 4; ++i) {
          const double error = errors[i] / kTolerance<T>;
          if (!(error <= worst)) worst = error;
          if (error <= 1) continue;
          ++failures;
          std::printf("%s on %s, %d bytes, tile %d, %d workers: error %g\n", names[i], bsfast::isa_name(isa),
                      int(sizeof(T)), tile, int(workers), errors[i]);
        }
      }
    }
  }
  if (failures > 0)
    std::printf("... with M=%d, N=%d * %d, %d groups of %d to %d channels, %dx%d, padding %d, %d\n", int(s.branches),
                int(s.repeats), int(s.samples), int(s.groups), int(s.in_channels), int(s.out_channels), int(s.size[0]),
                int(s.size[1]), int(s.padding[0]), int(s.padding[1]));
  return failures;
}

}  // namespace

int main() {
  const ConvShape cases[] = {
      // M, repeats, samples, groups, C_in, C_out, size, kernel, stride, padding, dilation, shared
      {2, 1, 16, 1, 3, 8, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
      {2, 1, 32, 1, 6, 5, {5, 7}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // odd sizes, an odd channel
      {2, 1, 17, 1, 2, 9, {5, 4}, {3, 3}, {1, 1}, {0, 0}, {1, 1}, false},  // ragged samples, paddings
      {1, 1, 20, 1, 4, 3, {6, 3}, {3, 3}, {1, 1}, {2, 0}, {1, 1}, false},
      {1, 1, 48, 1, 3, 2, {1, 2}, {3, 3}, {1, 1}, {1, 2}, {1, 1}, false},    // smaller than a kernel
      {2, 1, 5, 1, 2, 4, {3, 3}, {3, 3}, {1, 1}, {2, 2}, {1, 1}, true},      // shared input, fewer samples than lanes
      {2, 1, 24, 3, 2, 5, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},    // groups
      {2, 1, 17, 2, 1, 2, {4, 5}, {3, 3}, {1, 1}, {1, 0}, {1, 1}, true},     // and shared input
      {1, 1, 40, 1, 19, 17, {3, 9}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // many channels
      {1, 1, 70, 1, 90, 2, {4, 16}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // chunks of samples
      {2, 3, 16, 1, 2, 3, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},    // repeats
      {17, 1, 16, 1, 1, 2, {3, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}};  // as many branches as units
  int failures = 0;
  double worst = 0, worst_double = 0;
  for (const ConvShape& s : cases) failures += failures_of<float>(s, worst) + failures_of<double>(s, worst_double);
  std::printf("%d failures on %s; worst errors %.2g and %.2g of the tolerances %.0e and %.0e\n", failures,
              bsfast::isa_name(bsfast::best_isa()), worst, worst_double, kTolerance<float>, kTolerance<double>);
  return failures != 0;
}
