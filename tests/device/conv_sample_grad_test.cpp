// The weight gradient of every sample as a CUDA kernel, emulated, against plain loops; every order of the threads must
// give the same bits.
#include "emulation/cuda.h"
// The emulation comes before device code.
#include "conv_problem.h"
#include "cuda/conv_sample_plan.h"
#include "emulation/launch.h"

namespace {

using namespace bsfast;
using namespace bsfast::test;

// Seed r of a sample is its gradient times -1 to the r, and r more.
template <class T>
void test_shape(const ConvShape& s, int64_t seeds) {
  const Problem<T> p(s);
  const int64_t all = seeds * s.samples;
  Memory<T> grad(p.y.count * seeds), result(p.weight.count * all), first(result.count);
  for (int64_t i = 0; i < grad.count; ++i) {
    const int64_t column = i % all, seed = column / s.samples;
    const float own = to_float(p.y.data[i / all * s.samples + column % s.samples]);
    from_float((seed % 2 == 0 ? own : -own) + float(seed), grad.data[i]);
  }
  std::vector<Sum> sums(size_t(result.count));
  each_product(s, [&](int64_t xi, int64_t wi, int64_t yi) {
    for (int64_t seed = 0; seed < seeds; ++seed) {
      const int64_t column = seed * s.samples + yi % s.samples, at = yi / s.samples * all + column;
      sums[size_t(wi * all + column)].add(double(to_float(p.x.data[xi])) * double(to_float(grad.data[at])));
    }
  });
  const auto what = std::string("per-sample weight gradient in ") + storage_name<T>() + ", " + std::to_string(seeds) +
                    " seeds, " + describe(s);
  const auto arguments = cuda::sample_grad_arguments<T>(s, seeds, p.x.data, grad.data, result.data);
  for (Order order : kOrders) {
    result.poison();
    cuda::conv_sample_grad(s, arguments, emulation::Launcher{order});
    if (order == Order::forward) {
      expect_sums(result.data, sums, what);
      std::memcpy(first.data, result.data, result.bytes());
    }
    expect(std::memcmp(first.data, result.data, result.bytes()) == 0, what + ": depends on the order of threads");
  }
}

}  // namespace

int main() {
  for (const ConvShape& s : kShapes) {
    test_shape<float>(s, 1);
    test_shape<float>(s, 3);
    test_shape<Half>(s, 1);
    test_shape<BFloat16>(s, 2);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
