// The per-sample weight gradient that bsfast/ops declares, on LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "conv_operands.h"
#include "cpu/conv_sample_grad.h"
#include "cpu/tensors.h"

namespace bsfast {
namespace {

constexpr const char* kOp = "conv2d_weight_grad_per_sample_out";

template <class T>
void run_sample_grad(const SampleGradPlan& plan, const Tensor& x, const Tensor& grad, Tensor& out) {
  static const SampleGrad<T> kernel = sample_grad<T>(chosen_isa(kOp));
  const T *in = data<T>(x), *g = data<T>(grad);
  T* to = result<T>(out);
  torch::stable::parallel_for(0, kernel.units(plan), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate(kOp, kernel.scratch_bytes(plan));
    kernel.run(plan, in, g, to, scratch.get(), begin, end);
  });
}

void conv2d_weight_grad_per_sample_out(const Tensor& x, const Tensor& grad, Tensor out, Ints stride, Ints padding,
                                       Ints dilation, int64_t groups) {
  const ConvShape s = describe_per_sample(kOp, x, grad, out, stride, padding, dilation, groups);
  check_kinds(kOp, x, grad, out);
  if (out.numel() == 0) return;
  if (grad.numel() == 0) {  // sums over no positions
    std::memset(out.mutable_data_ptr(), 0, size_t(out.numel()) * (x.scalar_type() == ScalarType::Float ? 4 : 8));
    return;
  }
  check_batch_last(x, kOp, "x");
  check_batch_last(grad, kOp, "grad");
  const SampleGradPlan plan{s, out.size(5) / s.samples};
  x.scalar_type() == ScalarType::Float ? run_sample_grad<float>(plan, x, grad, out)
                                       : run_sample_grad<double>(plan, x, grad, out);
}

}  // namespace
}  // namespace bsfast

STABLE_TORCH_LIBRARY_IMPL(bsfast, CPU, library) {
  library.impl("conv2d_weight_grad_per_sample_out", TORCH_BOX(&bsfast::conv2d_weight_grad_per_sample_out));
}
