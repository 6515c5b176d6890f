// Convolution and its input gradient as CUDA kernels, emulated, against plain loops; every order of the threads must
// give the same bits.
#include "emulation/cuda.h"
// The emulation comes before device code.
#include "conv_problem.h"
#include "cuda/conv_plan.h"
#include "emulation/launch.h"

namespace {

using namespace bsfast;
using namespace bsfast::test;

template <class T>
void test_shape(const Problem<T>& p, bool transposed) {
  if (transposed && p.s.shared_input && p.s.groups > 1) return;
  const Memory<T>& source = transposed ? p.y : p.x;
  Memory<T> result((transposed ? p.x : p.y).count), first(result.count);
  const auto what =
      std::string(transposed ? "input gradient" : "convolution") + " in " + storage_name<T>() + ", " + describe(p.s);
  const auto arguments = cuda::gather_arguments<T>(p.s, transposed, source.data, p.weight.data, result.data);
  for (Order order : kOrders) {
    result.poison();
    cuda::conv_gather(p.s, arguments, emulation::Launcher{order});
    if (order == Order::forward) {
      expect_sums(result.data, transposed ? p.x_sums : p.y_sums, what);
      std::memcpy(first.data, result.data, result.bytes());
    }
    expect(std::memcmp(first.data, result.data, result.bytes()) == 0, what + ": depends on the order of threads");
  }
}

template <class T>
void test_storage() {
  for (const ConvShape& s : kShapes) {
    const Problem<T> problem(s);
    test_shape(problem, false);
    test_shape(problem, true);
  }
}

void test_errors() {
  const auto plan = [](const ConvShape& s, bool transposed) {
    cuda::gather_arguments<float>(s, transposed, nullptr, nullptr, nullptr);
  };
  ConvShape s{2, 1, 1 << 20, 1, 3, 3, {64, 64}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false};
  expect_error("conv2d: elements of one channel must be below 2^31 on CUDA, got 4567597056", [&] { plan(s, false); });
  s.samples = int64_t(1) << 31;
  expect_error("conv2d: the number of samples must be below 2^31 on CUDA, got 2147483648", [&] { plan(s, true); });
  s = {2, 1, 4, 3, 3, 3, {4, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true};
  expect_error("groups must be 1 for the gradient of a shared input, got 3", [&] { plan(s, true); });
}

}  // namespace

int main() {
  test_errors();
  test_storage<float>();
  test_storage<Half>();
  test_storage<BFloat16>();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
