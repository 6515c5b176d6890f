// The weight gradient as a CUDA kernel, emulated, against plain loops; every order of the threads must give the same
// bits.
#include "emulation/cuda.h"
// The emulation comes before device code.
#include "conv_problem.h"
#include "cuda/conv_plan.h"
#include "emulation/launch.h"

namespace {

using namespace bsfast;
using namespace bsfast::test;

template <class T>
void test_shape(const ConvShape& s) {
  const Problem<T> p(s);
  Memory<T> result(p.weight.count), first(p.weight.count);
  const auto what = std::string("weight gradient in ") + storage_name<T>() + ", " + describe(s);
  auto arguments = cuda::weight_grad_arguments<T>(s, p.x.data, p.y.data);
  Memory<float> partial(arguments.parts * p.weight.count);
  arguments.partial = partial.data;
  for (Order order : kOrders) {
    result.poison();
    partial.poison();
    cuda::conv_weight_grad(s, arguments, result.data, emulation::Launcher{order});
    if (order == Order::forward) {
      expect_sums(result.data, p.weight_sums, what);
      std::memcpy(first.data, result.data, result.bytes());
    }
    expect(std::memcmp(first.data, result.data, result.bytes()) == 0, what + ": depends on the order of threads");
  }
}

}  // namespace

int main() {
  for (const ConvShape& s : kShapes) {
    test_shape<float>(s);
    test_shape<Half>(s);
    test_shape<BFloat16>(s);
  }
  // Several parts.
  test_shape<float>({1, 1, 66, 1, 2, 3, {8, 9}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false});
  test_shape<BFloat16>({2, 1, 33, 1, 1, 2, {9, 17}, {3, 1}, {1, 1}, {1, 0}, {1, 1}, false});
  std::printf("%d failures\n", failures);
  return failures != 0;
}
