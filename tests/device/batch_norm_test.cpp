// Statistics in a convolution's epilogue and normalisation in the next one's prologue, emulated, against doubles.
#include "emulation/cuda.h"
// The emulation comes before device code.
#include "conv_problem.h"
#include "cuda/batch_norm_plan.h"
#include "cuda/conv_plan.h"
#include "emulation/launch.h"

namespace {

using namespace bsfast;
using namespace bsfast::test;

constexpr float kEps = 1e-5f;

void expect_near(double got, double truth, double bound, const std::string& what) {
  expect(std::fabs(got - truth) <= bound, what + ": " + std::to_string(got) + ", must be " + std::to_string(truth));
}

// The mean of y is large next to its deviation: a sum of squares in float would have no correct digit.
template <class T>
void test_statistics(const ConvShape& s) {
  Problem<T> p(s);
  for (int64_t i = 0; i < p.x.count; ++i) from_float(to_float(p.x.data[i]) * 0.001f + 30.0f, p.x.data[i]);
  const int64_t channels = s.branches * s.groups * s.out_channels, elements = p.channel_elements();
  Memory<T> y(p.y.count);
  auto arguments = cuda::gather_arguments<T>(s, false, p.x.data, p.weight.data, y.data);
  Memory<float> partial(channels * arguments.parts * 3), weight(channels), bias(channels), results(5 * channels);
  arguments.statistics = partial.data;
  for (int64_t c = 0; c < channels; ++c) weight.data[c] = 1.0f + 0.25f * float(c), bias.data[c] = 0.5f - float(c);
  float* const to = results.data;
  const MergeArguments merge = {partial.data,  weight.data,       bias.data,         to,
                                to + channels, to + 2 * channels, to + 3 * channels, to + 4 * channels,
                                kEps,          channels,          arguments.parts};
  std::vector<float> first;
  for (Order order : kOrders) {
    const emulation::Launcher launch{order};
    for (Memory<float>* memory : {&partial, &results}) memory->poison();
    cuda::conv_gather(s, arguments, launch);
    cuda::merge_statistics(merge, launch);
    if (order == Order::forward) first.assign(to, to + 5 * channels);
    expect(std::memcmp(first.data(), to, results.bytes()) == 0, "statistics depend on the order of threads");
  }
  for (int64_t c = 0; c < channels; ++c) {
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < elements; ++i) mean += double(to_float(y.data[c * elements + i])) / double(elements);
    for (int64_t i = 0; i < elements; ++i) squares += std::pow(double(to_float(y.data[c * elements + i])) - mean, 2);
    const double variance = squares / double(elements), inv = 1 / std::sqrt(variance + double(kEps));
    const double scale = double(weight.data[c]) * inv, size = std::fabs(mean) + 1;
    const std::string what = std::string(storage_name<T>()) + ", " + describe(s) + ": ";
    // A few roundings; that of the mean enters the variance squared, and the variance enters what follows.
    const double relative = 4e-6, mean_bound = relative * size;
    const double variance_bound = relative * variance + std::pow(size * 0x1p-22, 2);
    const double inv_bound = relative * inv + inv * inv * inv * variance_bound;
    const double scale_bound = relative * scale + double(weight.data[c]) * inv_bound;
    expect_near(to[c], mean, mean_bound, what + "mean");
    expect_near(to[2 * channels + c], variance, variance_bound, what + "variance");
    expect_near(to[channels + c], inv, inv_bound, what + "inv");
    expect_near(to[3 * channels + c], scale, scale_bound, what + "scale");
    expect_near(to[4 * channels + c], double(bias.data[c]) - mean * scale,
                relative * size * (1 + scale) + std::fabs(mean) * scale_bound, what + "shift");
  }
}

// conv(act(scale x + shift)) against the same with act(...) computed here; zero padding comes after the activation.
template <class T>
void test_normalise(const ConvShape& s, bool relu) {
  Problem<float> p(s);
  const int64_t channels = p.x.count / (s.size[0] * s.size[1] * s.samples);
  Memory<float> scale(channels), shift(channels);
  for (int64_t c = 0; c < channels; ++c) scale.data[c] = 0.5f - float(c % 3), shift.data[c] = 0.25f + 0.125f * float(c);
  Memory<T> x(p.x.count), weight(p.weight.count), y(p.y.count);
  for (int64_t i = 0; i < p.x.count; ++i) from_float(p.x.data[i], x.data[i]);
  for (int64_t i = 0; i < p.weight.count; ++i) from_float(p.weight.data[i], weight.data[i]);
  std::vector<Sum> sums(size_t(p.y.count));
  each_product(s, [&](int64_t xi, int64_t wi, int64_t yi) {
    const int64_t c = xi / (s.size[0] * s.size[1] * s.samples);
    double value = double(to_float(x.data[xi])) * double(scale.data[c]) + double(shift.data[c]);
    if (relu && value < 0) value = 0;
    sums[size_t(yi)].add(value * double(to_float(weight.data[wi])));
  });
  auto arguments = cuda::gather_arguments<T>(s, false, x.data, weight.data, y.data);
  arguments.normalise = {scale.data, shift.data, relu};
  cuda::conv_gather(s, arguments, emulation::Launcher{Order::random});
  expect_sums(y.data, sums, std::string("normalised in ") + storage_name<T>() + ", " + describe(s));
}

void test_normalise_keeps_nan() {
  const ConvShape s{1, 1, 2, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false};
  float x[2] = {NAN, -1}, weight = 1, scale = 1, shift = 0;
  Memory<float> y(2), source(2);
  std::memcpy(source.data, x, sizeof(x));
  auto arguments = cuda::gather_arguments<float>(s, false, source.data, &weight, y.data);
  arguments.normalise = {&scale, &shift, true};
  cuda::conv_gather(s, arguments, emulation::Launcher{Order::forward});
  expect(std::isnan(y.data[0]) && y.data[1] == 0, "ReLU keeps NaN");
}

template <class T>
void test_storage() {
  for (const ConvShape& s : kShapes) {
    if (s.out_size(0) * s.out_size(1) == 0) continue;
    test_statistics<T>(s);
    for (bool relu : {false, true}) test_normalise<T>(s, relu);
  }
}

}  // namespace

int main() {
  test_storage<float>();
  test_storage<Half>();
  test_storage<BFloat16>();
  test_normalise_keeps_nan();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
