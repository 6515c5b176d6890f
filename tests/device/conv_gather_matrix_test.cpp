// Convolution and its input gradient on the matrix units, emulated, against plain loops; every order of the threads
// must give the same bits.
#include "emulation/cuda.h"
// The emulation comes before device code.
#include "conv_problem.h"
#include "cuda/conv_matrix_plan.h"
#include "emulation/launch.h"

namespace {

using namespace bsfast;
using namespace bsfast::test;

// M, repeats, N, groups, C_in, C_out, size, kernel, stride, padding, dilation, shared input
const ConvShape kMatrixShapes[] = {
    {1, 1, 64, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false},
    {2, 1, 64, 1, 6, 6, {5, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
    {1, 1, 128, 1, 3, 9, {3, 5}, {3, 3}, {1, 1}, {1, 0}, {1, 1}, false},   // two tiles of channels, and of samples
    {1, 1, 56, 1, 14, 20, {2, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // ragged samples, chunks of channels
    {1, 1, 64, 1, 2, 33, {2, 3}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},   // two rounds of channel tiles
    {1, 1, 64, 1, 26, 4, {4, 4}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, false},   // strides
    {2, 1, 48, 1, 5, 12, {5, 4}, {1, 1}, {2, 3}, {0, 0}, {1, 1}, false},   // most of the input is not read
    {1, 1, 64, 1, 3, 5, {8, 7}, {3, 2}, {2, 3}, {4, 2}, {3, 2}, false},    // dilation
    {2, 1, 64, 2, 3, 4, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},    // groups
    {3, 1, 64, 1, 3, 6, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true},     // shared input
    {1, 1, 64, 1, 2, 4, {1, 2}, {5, 3}, {1, 1}, {2, 4}, {1, 1}, false},    // kernel larger than the image
};

template <class T>
void test_shape(const Problem<T>& p, bool transposed) {
  const Memory<T>& source = transposed ? p.y : p.x;
  Memory<T> result((transposed ? p.x : p.y).count), first(result.count);
  const auto what = std::string(transposed ? "input gradient" : "convolution") + " on matrix units in " +
                    storage_name<T>() + ", " + describe(p.s);
  const auto arguments =
      cuda::matrix_arguments(cuda::gather_arguments<T>(p.s, transposed, source.data, p.weight.data, result.data));
  if (!arguments) return expect(false, what + ": does not fit");
  for (Order order : kOrders) {
    result.poison();
    cuda::conv_gather_matrix(p.s, *arguments, emulation::Launcher{order});
    if (order == Order::forward) {
      expect_sums(result.data, transposed ? p.x_sums : p.y_sums, what);
      std::memcpy(first.data, result.data, result.bytes());
    }
    expect(std::memcmp(first.data, result.data, result.bytes()) == 0, what + ": depends on the order of threads");
  }
}

// conv(act(scale x + shift)), where the normalised input is rounded to storage, and the statistics of the result.
template <class T>
void test_normalise_and_statistics(const Problem<T>& p, bool relu) {
  const ConvShape& s = p.s;
  const int64_t pixels = s.size[0] * s.size[1] * s.samples, sources = p.x.count / pixels;
  const int64_t targets = s.branches * s.groups * s.out_channels, elements = p.channel_elements();
  Memory<float> scale(sources), shift(sources);
  for (int64_t c = 0; c < sources; ++c) scale.data[c] = 0.5f - float(c % 3), shift.data[c] = 0.25f + 0.125f * float(c);
  Memory<T> x(p.x.count), y(p.y.count), plain(p.y.count);
  for (int64_t i = 0; i < x.count; ++i) {
    const float value = std::fma(to_float(p.x.data[i]), scale.data[i / pixels], shift.data[i / pixels]);
    from_float(relu && value < 0 ? 0.0f : value, x.data[i]);
  }
  const auto start = [&](const T* source, Memory<T>& to, Normalise normalise, float* statistics) {
    auto a = cuda::gather_arguments<T>(s, false, source, p.weight.data, to.data);
    a.normalise = normalise;
    a.statistics = statistics;
    cuda::conv_gather_matrix(s, *cuda::matrix_arguments(a), emulation::Launcher{Order::random});
  };
  const auto fitting = *cuda::matrix_arguments(cuda::gather_arguments<T>(s, false, x.data, p.weight.data, y.data));
  const int parts = fitting.gather.parts;
  Memory<float> partial(targets * parts * 3);
  start(x.data, plain, {}, nullptr);
  start(p.x.data, y, {scale.data, shift.data, relu}, partial.data);
  const std::string what = std::string(storage_name<T>()) + ", " + describe(s);
  expect(std::memcmp(plain.data, y.data, y.bytes()) == 0, what + ": normalised as it is read");
  for (int64_t c = 0; c < targets; ++c) {
    double count = 0, sum = 0, truth = 0, squares = 0, true_squares = 0;
    for (int part = 0; part < parts; ++part) {
      const float* from = partial.data + (c * parts + part) * 3;
      count += double(from[0]);
      sum += double(from[0]) * double(from[1]);
    }
    for (int64_t i = 0; i < elements; ++i) truth += double(to_float(y.data[c * elements + i]));
    const double mean = truth / double(elements);
    for (int part = 0; part < parts; ++part) {
      const float* from = partial.data + (c * parts + part) * 3;
      squares += double(from[2]) + double(from[0]) * std::pow(double(from[1]) - mean, 2);
    }
    for (int64_t i = 0; i < elements; ++i)
      true_squares += std::pow(double(to_float(y.data[c * elements + i])) - mean, 2);
    expect(count == double(elements), what + ": count of the statistics");
    expect(std::fabs(sum - truth) <= 4e-6 * (std::fabs(truth) + double(elements)), what + ": mean");
    expect(std::fabs(squares - true_squares) <= 4e-6 * (true_squares + 1), what + ": squared deviations");
  }
}

template <class T>
void test_storage() {
  for (const ConvShape& s : kMatrixShapes) {
    const Problem<T> problem(s);
    test_shape(problem, false);
    test_shape(problem, true);
    for (bool relu : {false, true}) test_normalise_and_statistics(problem, relu);
  }
}

void test_what_does_not_fit() {
  const auto fits = [](const ConvShape& s) {
    return cuda::matrix_arguments(cuda::gather_arguments<Half>(s, false, nullptr, nullptr, nullptr)).has_value();
  };
  expect(fits({1, 1, 128, 1, 48, 48, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "wide branches fit");
  expect(!fits({1, 1, 65, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "odd N does not fit");
  expect(!fits({1, 1, 72, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "half-empty blocks do not fit");
  expect(!fits({1, 1, 64, 1, 6, 6, {64, 64}, {3, 3}, {1, 1}, {1, 1}, {9, 9}, false}), "wide windows do not fit");
}

}  // namespace

int main() {
  test_storage<Half>();
  test_storage<BFloat16>();
  test_what_does_not_fit();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
