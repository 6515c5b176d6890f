// Every kernel that the plan may start, to be compiled only.
#include "cuda/conv_matrix_plan.h"
#include "cuda/conv_sample_plan.h"
#include "cuda/conv_weight_grad_matrix_plan.h"
#include "cuda/statistics_plan.h"

namespace bsfast {
namespace {

struct Launcher {
  template <class Kernel, class Argument>
  void operator()(Kernel kernel, const cuda::Grid& grid, Argument argument) const {
    kernel<<<grid.blocks, grid.threads, grid.shared_bytes>>>(argument);
  }
};

template <class T>
void start(const ConvShape& s) {
  cuda::conv_gather(s, cuda::gather_arguments<T>(s, false, nullptr, nullptr, nullptr), Launcher{});
  cuda::conv_weight_grad(s, cuda::weight_grad_arguments<T>(s, nullptr, nullptr), static_cast<T*>(nullptr), Launcher{});
  cuda::conv_sample_grad(s, cuda::sample_grad_arguments<T>(s, 1, nullptr, nullptr, nullptr), Launcher{});
}

template <class T>
void start_on_matrix_units(const ConvShape& s) {
  const auto units = cuda::matrix_units_of(800, {800});
  const auto arguments = cuda::matrix_arguments(cuda::gather_arguments<T>(s, true, nullptr, nullptr, nullptr), units);
  if (arguments) cuda::conv_gather_matrix(s, *arguments, units, Launcher{});
  const auto grad = cuda::matrix_arguments(cuda::weight_grad_arguments<T>(s, nullptr, nullptr), units);
  if (grad) cuda::conv_weight_grad(s, *grad, static_cast<T*>(nullptr), Launcher{});
}

}  // namespace

void start_all(const ConvShape& s) {
  start_on_matrix_units<Half>(s);
  start_on_matrix_units<BFloat16>(s);
  cuda::merge_statistics({}, Launcher{});
  start<float>(s);
  start<Half>(s);
  start<BFloat16>(s);
}

}  // namespace bsfast
