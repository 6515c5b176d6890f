// What convolutions do with their source and result on the ordinary units, emulated, against doubles: normalisation as
// they read, epilogue as they store, statistics of what is stored.
#include "emulation/cuda.h"
// The emulation comes before device code.
#include "conv_around.h"
#include "cuda/conv_plan.h"

namespace {

using namespace bsfast;
using namespace bsfast::test;

// A convolution, or its transpose, with every epilogue; the statistics of the first, and its bits in every order.
template <class T>
void test_epilogue(const ConvShape& s, bool transposed) {
  if (transposed && s.shared_input && s.groups > 1) return;
  const Problem<T> p(s);
  const Memory<T>&source = transposed ? p.y : p.x, &like = transposed ? p.x : p.y;
  const int64_t elements = transposed ? s.size[0] * s.size[1] * s.samples : p.channel_elements();
  Around<T> around(like.count / elements, elements);
  Memory<T> y(like.count), first(like.count);
  for (const Given& given : kGiven) {
    auto arguments =
        cuda::gather_arguments<T>(s, transposed, source.data, p.weight.data, y.data, {}, around.epilogue(given));
    Memory<float> partial(transposed ? 0 : around.mean.count * arguments.parts * 3);
    if (!transposed) arguments.statistics = partial.data;
    const std::string what = std::string(transposed ? "input gradient" : "convolution") + " with its epilogue in " +
                             storage_name<T>() + ", " + describe(s);
    for (Order order : kOrders) {
      if (&given != kGiven && order != Order::random) continue;
      y.poison();
      partial.poison();
      cuda::conv_gather(s, arguments, emulation::Launcher{order});
      if (order == Order::forward) std::memcpy(first.data, y.data, y.bytes());
      expect(&given != kGiven || std::memcmp(first.data, y.data, y.bytes()) == 0, what + ": order of threads");
    }
    expect_sums(y.data, around.finished(transposed ? p.x_sums : p.y_sums, given), what);
    if (!transposed) around.expect_statistics(partial, arguments.parts, y.data, what);
  }
}

// The mean of y is large next to its deviation: a sum of squares in float would have no correct digit.
template <class T>
void test_statistics(const ConvShape& s) {
  Problem<T> p(s);
  for (int64_t i = 0; i < p.x.count; ++i) from_float(to_float(p.x.data[i]) * 0.001f + 30.0f, p.x.data[i]);
  Around<T> around(s.branches * s.groups * s.out_channels, p.channel_elements());
  Memory<T> y(p.y.count);
  auto arguments = cuda::gather_arguments<T>(s, false, p.x.data, p.weight.data, y.data);
  Memory<float> partial(around.mean.count * arguments.parts * 3);
  arguments.statistics = partial.data;
  std::vector<float> first;
  for (Order order : kOrders) {
    partial.poison();
    cuda::conv_gather(s, arguments, emulation::Launcher{order});
    if (order == Order::forward) first.assign(partial.data, partial.data + partial.count);
    expect(std::memcmp(first.data(), partial.data, partial.bytes()) == 0, "statistics depend on the order of threads");
  }
  around.expect_statistics(partial, arguments.parts, y.data, std::string(storage_name<T>()) + ", " + describe(s));
}

// conv(act(scale x + shift)), and the weight gradient with that input, against the same with act(...) computed here;
// zero padding comes after the activation.
template <class T>
void test_normalise(const ConvShape& s, bool relu) {
  const Problem<T> p(s);
  const int64_t pixels = s.size[0] * s.size[1] * s.samples, channels = p.x.count / pixels;
  Memory<float> scale(channels), shift(channels);
  for (int64_t c = 0; c < channels; ++c) scale.data[c] = 0.5f - float(c % 3), shift.data[c] = 0.25f + 0.125f * float(c);
  std::vector<Sum> sums(size_t(p.y.count)), weight_sums(size_t(p.weight.count));
  each_product(s, [&](int64_t xi, int64_t wi, int64_t yi) {
    const double scaled = double(to_float(p.x.data[xi])) * double(scale.data[xi / pixels]);
    const double shifted = scaled + double(shift.data[xi / pixels]), value = relu && shifted < 0 ? 0 : shifted;
    sums[size_t(yi)].add(value * double(to_float(p.weight.data[wi])));
    weight_sums[size_t(wi)].add(value * double(to_float(p.y.data[yi])));
    // The rounding of a normalised value is relative to its terms.
    sums[size_t(yi)].magnitude += std::fabs(scaled * double(to_float(p.weight.data[wi])));
    weight_sums[size_t(wi)].magnitude += std::fabs(scaled * double(to_float(p.y.data[yi])));
  });
  const Normalise normalise{scale.data, shift.data, relu};
  const emulation::Launcher launch{Order::random};
  const std::string what = std::string("normalised in ") + storage_name<T>() + ", " + describe(s);
  Memory<T> y(p.y.count), weight_grad(p.weight.count);
  cuda::conv_gather(s, cuda::gather_arguments<T>(s, false, p.x.data, p.weight.data, y.data, normalise), launch);
  expect_sums(y.data, sums, what);
  auto arguments = cuda::weight_grad_arguments<T>(s, p.x.data, p.y.data, normalise);
  Memory<float> partial(arguments.parts * p.weight.count);
  arguments.partial = partial.data;
  cuda::conv_weight_grad(s, arguments, weight_grad.data, launch);
  expect_sums(weight_grad.data, weight_sums, "weight gradient, " + what);
}

void test_normalise_keeps_nan() {
  const ConvShape s{1, 1, 2, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false};
  float x[2] = {NAN, -1}, weight = 1, scale = 1, shift = 0;
  Memory<float> y(2), source(2);
  std::memcpy(source.data, x, sizeof(x));
  const Normalise normalise{&scale, &shift, true};
  cuda::conv_gather(s, cuda::gather_arguments<float>(s, false, source.data, &weight, y.data, normalise),
                    emulation::Launcher{Order::forward});
  expect(std::isnan(y.data[0]) && y.data[1] == 0, "ReLU keeps NaN");
  const Epilogue<float> epilogue{nullptr, nullptr, nullptr, nullptr, true};
  cuda::conv_gather(s, cuda::gather_arguments<float>(s, false, source.data, &weight, y.data, {}, epilogue),
                    emulation::Launcher{Order::forward});
  expect(std::isnan(y.data[0]) && y.data[1] == 0, "ReLU of the result keeps NaN");
}

// What lies beside the target need not lie at a multiple of a vector.
void test_odd_addresses() {
  const ConvShape s{1, 1, 4, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false};
  const Problem<Half> p(s);
  Memory<Half> y(4), beside(5);
  for (int i = 0; i < 5; ++i) from_float(float(i), beside.data[i]);
  const Epilogue<Half> epilogue{nullptr, nullptr, beside.data + 1, nullptr, false};
  cuda::conv_gather(s, cuda::gather_arguments<Half>(s, false, p.x.data, p.weight.data, y.data, {}, epilogue),
                    emulation::Launcher{Order::random});
  auto sums = p.y_sums;
  for (size_t i = 0; i < 4; ++i) sums[i].add(double(i) + 1);
  expect_sums(y.data, sums, "a residual at an odd address");
}

template <class T>
void test_storage() {
  for (const ConvShape& s : kShapes) {
    if (s.out_size(0) * s.out_size(1) == 0) continue;
    for (bool transposed : {false, true}) test_epilogue<T>(s, transposed);
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
  test_odd_addresses();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
