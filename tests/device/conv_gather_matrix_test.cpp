// Convolution and its input gradient on the matrix units, emulated, against plain loops; every order of the threads
// must give the same bits.
#include "emulation/cuda.h"
// The emulation comes before device code.
#include "conv_around.h"
#include "cuda/conv_matrix_plan.h"

namespace {

using namespace bsfast;
using namespace bsfast::test;
using cuda::MatrixUnits;

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

std::string name(MatrixUnits units) {
  return units == MatrixUnits::sm_70 ? " on matrix units of sm_70 in " : " on matrix units in ";
}

template <class T>
void test_shape(const Problem<T>& p, MatrixUnits units, bool transposed) {
  const Memory<T>& source = transposed ? p.y : p.x;
  Memory<T> result((transposed ? p.x : p.y).count), first(result.count);
  const auto what = std::string(transposed ? "input gradient" : "convolution") + name(units) + storage_name<T>() +
                    ", " + describe(p.s);
  const auto arguments = cuda::matrix_arguments(
      cuda::gather_arguments<T>(p.s, transposed, source.data, p.weight.data, result.data), units);
  if (!arguments) return expect(false, what + ": does not fit");
  for (Order order : kOrders) {
    result.poison();
    cuda::conv_gather_matrix(p.s, *arguments, units, emulation::Launcher{order});
    if (order == Order::forward) {
      expect_sums(result.data, transposed ? p.x_sums : p.y_sums, what);
      std::memcpy(first.data, result.data, result.bytes());
    }
    expect(std::memcmp(first.data, result.data, result.bytes()) == 0, what + ": depends on the order of threads");
  }
}

// conv(act(scale x + shift)), where the normalised input is rounded to storage: as the convolution of that input.
template <class T>
void test_normalise(const Problem<T>& p, MatrixUnits units, bool relu) {
  const ConvShape& s = p.s;
  const int64_t pixels = s.size[0] * s.size[1] * s.samples, sources = p.x.count / pixels;
  Memory<float> scale(sources), shift(sources);
  for (int64_t c = 0; c < sources; ++c) scale.data[c] = 0.5f - float(c % 3), shift.data[c] = 0.25f + 0.125f * float(c);
  Memory<T> x(p.x.count), y(p.y.count), plain(p.y.count);
  for (int64_t i = 0; i < x.count; ++i) {
    const float value = std::fma(to_float(p.x.data[i]), scale.data[i / pixels], shift.data[i / pixels]);
    from_float(relu && value < 0 ? 0.0f : value, x.data[i]);
  }
  const auto start = [&](const T* source, Memory<T>& to, const Normalise& normalise) {
    const auto a = cuda::gather_arguments<T>(s, false, source, p.weight.data, to.data, normalise);
    cuda::conv_gather_matrix(s, *cuda::matrix_arguments(a, units), units, emulation::Launcher{Order::random});
  };
  start(x.data, plain, {});
  start(p.x.data, y, {scale.data, shift.data, relu});
  expect(std::memcmp(plain.data, y.data, y.bytes()) == 0,
         "normalised as it is read" + name(units) + storage_name<T>() + ", " + describe(s));
}

// Every epilogue, and the statistics of what is stored; the first in every order.
template <class T>
void test_epilogue(const Problem<T>& p, MatrixUnits units, bool transposed) {
  const ConvShape& s = p.s;
  const Memory<T>&source = transposed ? p.y : p.x, &like = transposed ? p.x : p.y;
  const int64_t elements = transposed ? s.size[0] * s.size[1] * s.samples : p.channel_elements();
  Around<T> around(like.count / elements, elements);
  Memory<T> y(like.count), first(like.count);
  const std::string what = std::string("epilogue") + name(units) + storage_name<T>() + ", " + describe(s);
  for (const Given& given : kGiven) {
    auto m = *cuda::matrix_arguments(
        cuda::gather_arguments<T>(s, transposed, source.data, p.weight.data, y.data, {}, around.epilogue(given)),
        units);
    Memory<float> partial(transposed ? 0 : around.mean.count * m.gather.parts * 3);
    if (!transposed) m.gather.statistics = partial.data;
    for (Order order : kOrders) {
      if (&given != kGiven && order != Order::random) continue;
      y.poison();
      partial.poison();
      cuda::conv_gather_matrix(s, m, units, emulation::Launcher{order});
      if (order == Order::forward) std::memcpy(first.data, y.data, y.bytes());
      expect(&given != kGiven || std::memcmp(first.data, y.data, y.bytes()) == 0, what + ": order of threads");
    }
    expect_sums(y.data, around.finished(transposed ? p.x_sums : p.y_sums, given), what);
    if (!transposed) around.expect_statistics(partial, m.gather.parts, y.data, what);
  }
}

template <class T>
void test_storage(std::initializer_list<MatrixUnits> all_units) {
  for (const ConvShape& s : kMatrixShapes) {
    const Problem<T> problem(s);
    for (MatrixUnits units : all_units) {
      for (bool transposed : {false, true}) test_shape(problem, units, transposed);
      for (bool relu : {false, true}) test_normalise(problem, units, relu);
      for (bool transposed : {false, true}) test_epilogue(problem, units, transposed);
    }
  }
}

void test_what_does_not_fit() {
  const auto fits = [](const ConvShape& s) {
    const auto a = cuda::gather_arguments<Half>(s, false, nullptr, nullptr, nullptr);
    return cuda::matrix_arguments(a, MatrixUnits::sm_80).has_value();
  };
  expect(fits({1, 1, 128, 1, 48, 48, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "wide branches fit");
  expect(!fits({1, 1, 65, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "odd N does not fit");
  expect(!fits({1, 1, 72, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "half-empty blocks do not fit");
  expect(!fits({1, 1, 64, 1, 6, 6, {64, 64}, {3, 3}, {1, 1}, {1, 1}, {9, 9}, false}), "wide windows do not fit");
  const ConvShape s{1, 1, 64, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false};
  Memory<Half> beside(9);
  for (bool mask : {false, true}) {
    const Half* odd = beside.data + 1;
    const Epilogue<Half> epilogue{nullptr, nullptr, mask ? nullptr : odd, mask ? odd : nullptr, false};
    const auto a = cuda::gather_arguments<Half>(s, false, nullptr, nullptr, nullptr, {}, epilogue);
    expect(!cuda::matrix_arguments(a, MatrixUnits::sm_80).has_value(),
           "what lies beside the target must be aligned, too");
  }
}

void test_which_units() {
  const auto of = [](int device, std::initializer_list<int> compiled) {
    return cuda::matrix_units_of(device, compiled);
  };
  const MatrixUnits none = MatrixUnits::none, sm_70 = MatrixUnits::sm_70, sm_80 = MatrixUnits::sm_80;
  expect(of(700, {700, 750, 800, 900}) == sm_70 && of(700, {600}) == none, "sm_70, if compiled for it");
  for (int device : {720, 750}) expect(of(device, {700, 800}) == none, "later devices do not use sm_70's");
  for (int device : {800, 860, 900, 1200}) expect(of(device, {700, 750, 800}) == sm_80, "sm_80 and later");
  for (int device : {800, 860, 900, 1200}) expect(of(device, {700, 750}) == none, "and not the code of earlier ones");

  const ConvShape s{1, 1, 64, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false};
  const auto half = cuda::gather_arguments<Half>(s, false, nullptr, nullptr, nullptr);
  const auto bfloat16 = cuda::gather_arguments<BFloat16>(s, false, nullptr, nullptr, nullptr);
  expect(!cuda::matrix_arguments(half, none) && cuda::matrix_arguments(half, sm_70), "sm_70 multiplies half");
  expect(!cuda::matrix_arguments(bfloat16, sm_70) && cuda::matrix_arguments(bfloat16, sm_80), "and not bfloat16");
}

}  // namespace

int main() {
  test_storage<Half>({MatrixUnits::sm_80, MatrixUnits::sm_70});
  test_storage<BFloat16>({MatrixUnits::sm_80});
  test_which_units();
  test_what_does_not_fit();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
