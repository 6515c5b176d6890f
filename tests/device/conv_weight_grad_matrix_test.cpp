// The weight gradient on the matrix units, emulated, against plain loops; every order of the threads must give the same
// bits.
#include "emulation/cuda.h"
// The emulation comes before device code.
#include "conv_problem.h"
#include "cuda/conv_weight_grad_matrix_plan.h"
#include "emulation/launch.h"

namespace {

using namespace bsfast;
using namespace bsfast::test;

constexpr auto kUnits = cuda::MatrixUnits::sm_80;

// M, repeats, N, groups, C_in, C_out, size, kernel, stride, padding, dilation, shared input
const ConvShape kMatrixShapes[] = {
    {1, 1, 32, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false},
    {2, 1, 64, 1, 6, 6, {5, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
    {1, 1, 24, 1, 3, 9, {3, 5}, {3, 3}, {1, 1}, {1, 0}, {1, 1}, false},    // ragged samples, two tiles of channels
    {1, 1, 56, 1, 14, 20, {2, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // two warps side by side
    {1, 1, 32, 1, 20, 27, {2, 3}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // four
    {1, 1, 32, 1, 30, 35, {3, 2}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // two blocks of rows, five tiles
    {1, 1, 32, 1, 2, 50, {2, 3}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},   // two rounds of channel tiles
    {1, 1, 64, 1, 26, 4, {4, 4}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, false},   // strides
    {2, 1, 48, 1, 5, 12, {5, 4}, {1, 1}, {2, 3}, {0, 0}, {1, 1}, false},   // most of the input is not read
    {1, 1, 64, 1, 3, 5, {8, 7}, {3, 2}, {2, 3}, {4, 2}, {3, 2}, false},    // dilation
    {1, 1, 32, 1, 2, 3, {9, 9}, {3, 3}, {4, 2}, {1, 1}, {2, 4}, false},    // that shares factors with the stride
    {2, 1, 64, 2, 3, 4, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},    // groups
    {3, 1, 64, 1, 3, 6, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true},     // shared input
    {1, 1, 32, 1, 2, 4, {1, 2}, {5, 3}, {1, 1}, {2, 4}, {1, 1}, false},    // kernel larger than the image
    {1, 1, 32, 1, 3, 2, {2, 1}, {17, 16}, {1, 1}, {8, 8}, {1, 1}, false},  // more taps than a block has rows
    {1, 1, 32, 1, 2, 3, {13, 18}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // many windows, the last ones ragged
    {1, 1, 32, 1, 12, 9, {11, 9}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},  // two warps side by side, in parts
};

std::string name(const char* storage, const ConvShape& s) {
  return std::string("weight gradient on matrix units in ") + storage + ", " + describe(s);
}

template <class T>
void test_shape(const Problem<T>& p) {
  Memory<T> result(p.weight.count), first(p.weight.count);
  const auto what = name(storage_name<T>(), p.s);
  auto m = cuda::matrix_arguments(cuda::weight_grad_arguments<T>(p.s, p.x.data, p.y.data), kUnits);
  if (!m) return expect(false, what + ": does not fit");
  Memory<float> partial(m->grad.parts * p.weight.count);
  m->grad.partial = partial.data;
  for (Order order : kOrders) {
    result.poison();
    partial.poison();
    cuda::conv_weight_grad(p.s, *m, result.data, emulation::Launcher{order});
    if (order == Order::forward) {
      expect_sums(result.data, p.weight_sums, what);
      std::memcpy(first.data, result.data, result.bytes());
    }
    expect(std::memcmp(first.data, result.data, result.bytes()) == 0, what + ": depends on the order of threads");
  }
}

// Of act(scale x + shift), rounded to storage: as the gradient of that input.
template <class T>
void test_normalise(const Problem<T>& p, bool relu) {
  const ConvShape& s = p.s;
  const int64_t pixels = s.size[0] * s.size[1] * s.samples, inputs = p.x.count / pixels;
  Memory<float> scale(inputs), shift(inputs);
  for (int64_t c = 0; c < inputs; ++c) scale.data[c] = 0.5f - float(c % 3), shift.data[c] = 0.25f + 0.125f * float(c);
  Memory<T> x(p.x.count), result(p.weight.count), plain(p.weight.count);
  for (int64_t i = 0; i < x.count; ++i) {
    const float value = std::fma(to_float(p.x.data[i]), scale.data[i / pixels], shift.data[i / pixels]);
    from_float(relu && value < 0 ? 0.0f : value, x.data[i]);
  }
  const auto start = [&](const T* from, Memory<T>& to, const Normalise& normalise) {
    auto m = *cuda::matrix_arguments(cuda::weight_grad_arguments<T>(s, from, p.y.data, normalise), kUnits);
    Memory<float> partial(m.grad.parts * to.count);
    m.grad.partial = partial.data;
    cuda::conv_weight_grad(s, m, to.data, emulation::Launcher{Order::random});
  };
  start(x.data, plain, {});
  start(p.x.data, result, {scale.data, shift.data, relu});
  expect(std::memcmp(plain.data, result.data, result.bytes()) == 0,
         name(storage_name<T>(), s) + ": normalised as it is read");
}

template <class T>
void test_storage() {
  for (const ConvShape& s : kMatrixShapes) {
    const Problem<T> problem(s);
    test_shape(problem);
    for (bool relu : {false, true}) test_normalise(problem, relu);
  }
}

void test_what_does_not_fit() {
  const auto fits = [](const ConvShape& s, const Half* x = nullptr, cuda::MatrixUnits units = kUnits) {
    return cuda::matrix_arguments(cuda::weight_grad_arguments<Half>(s, x, nullptr), units).has_value();
  };
  const ConvShape small{1, 1, 64, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false};
  Memory<Half> x(9);
  expect(fits(small, x.data) && !fits(small, x.data + 1), "operands must be aligned");
  expect(fits({1, 1, 128, 1, 64, 128, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "wide branches fit");
  expect(!fits(small, x.data, cuda::MatrixUnits::sm_70) && !fits(small, x.data, cuda::MatrixUnits::none),
         "only sm_80 and later run it");
  expect(!fits({1, 1, (int64_t(1) << 31) - 8, 1, 1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false}),
         "indices of samples fit 32 bits");
  expect(!fits({1, 1, 65, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "odd N does not fit");
  expect(!fits({1, 1, 40, 1, 6, 6, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false}), "half-empty rows do not fit");
  expect(!fits({1, 1, 64, 1, 6, 6, {64, 64}, {3, 3}, {1, 1}, {1, 1}, {19, 19}, false}), "wide windows do not fit");
  expect(!fits({1, 1, 64, 1, 6, 6, {2, 2}, {3, 3}, {1, 1}, {0, 0}, {1, 1}, false}), "no output, nothing to do");
}

}  // namespace

int main() {
  test_storage<Half>();
  test_storage<BFloat16>();
  test_what_does_not_fit();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
