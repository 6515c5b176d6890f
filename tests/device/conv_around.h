// Random operands of what a convolution does with its result, and what must be stored then.
#pragma once

#include "conv_problem.h"
#include "cuda/statistics_plan.h"
#include "emulation/launch.h"

namespace bsfast::test {

// Which of them are there.
struct Given {
  bool coefficients, residual, relu, mask;
};

constexpr Given kGiven[] = {
    {true, true, true, true}, {true, false, true, false}, {false, true, false, true}, {false, false, false, true}};

template <class T>
struct Around {
  int64_t elements;  // of a channel
  Memory<float> scale, bias, mean, variance;
  Memory<T> residual, mask;

  Around(int64_t channels, int64_t elements)
      : elements(elements),
        scale(channels),
        bias(channels),
        mean(channels),
        variance(channels),
        residual(channels * elements),
        mask(channels * elements) {
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (Memory<float>* memory : {&scale, &bias})
      for (int64_t c = 0; c < channels; ++c) memory->data[c] = normal(random);
    for (int64_t i = 0; i < residual.count; ++i) from_float(normal(random), residual.data[i]);
    for (int64_t i = 0; i < mask.count; ++i) from_float(std::max(normal(random), 0.0f), mask.data[i]);
    if (mask.count > 0) from_float(NAN, mask.data[0]);  // passes what there is
  }

  Epilogue<T> epilogue(const Given& given) const {
    return {given.coefficients ? scale.data : nullptr, given.coefficients ? bias.data : nullptr,
            given.residual ? residual.data : nullptr, given.mask ? mask.data : nullptr, given.relu};
  }

  // What is stored in place of these sums.
  std::vector<Sum> finished(std::vector<Sum> sums, const Given& given) const {
    for (size_t i = 0; i < sums.size(); ++i) {
      const size_t c = i / size_t(elements);
      Sum& sum = sums[i];
      if (given.coefficients) {
        sum.value *= double(scale.data[c]);
        sum.magnitude *= std::fabs(double(scale.data[c]));
        sum.add(double(bias.data[c]));
      }
      if (given.residual) sum.add(double(to_float(residual.data[i])));
      sum.terms += 2;
      if ((given.relu && sum.value < 0) || (given.mask && to_float(mask.data[i]) <= 0)) sum.value = 0;
      if (given.mask && to_float(mask.data[i]) <= 0) sum.magnitude = 0;
    }
    return sums;
  }

  // Merges what blocks found of the result in `parts` parts, and compares it with the result.
  void expect_statistics(const Memory<float>& partial, int parts, const T* y, const std::string& what) {
    for (Memory<float>* memory : {&mean, &variance}) memory->poison();
    const int64_t channels = mean.count;
    cuda::merge_statistics({partial.data, mean.data, variance.data, channels, parts},
                           emulation::Launcher{Order::random});
    for (int64_t c = 0; c < channels; ++c) {
      double truth = 0, squares = 0;
      for (int64_t i = 0; i < elements; ++i) truth += double(to_float(y[c * elements + i])) / double(elements);
      for (int64_t i = 0; i < elements; ++i) squares += std::pow(double(to_float(y[c * elements + i])) - truth, 2);
      const double size = std::fabs(truth) + 1, own = squares / double(elements);
      const double got = double(mean.data[c]), got_variance = double(variance.data[c]);
      expect(std::fabs(got - truth) <= 4e-6 * size, what + ": mean " + std::to_string(got));
      // The rounding of the mean enters squared.
      expect(std::fabs(got_variance - own) <= 4e-6 * own + std::pow(size * 0x1p-22, 2),
             what + ": variance " + std::to_string(got_variance) + ", must be " + std::to_string(own));
    }
  }
};

}  // namespace bsfast::test
