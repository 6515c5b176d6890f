// Every kernel that the plan may start, to be compiled only.
#include "cuda/conv_plan.h"

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
}

}  // namespace

void start_all(const ConvShape& s) {
  start<float>(s);
  start<Half>(s);
  start<BFloat16>(s);
}

}  // namespace bsfast
