// The per-sample weight gradient that bsfast/ops declares, on LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "cpu/conv_sample_grad.h"
#include "cpu/tensors.h"
#include "shape.h"

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

// Sizes of the convolution, from those of its input and of the gradient of every sample.
template <class Sizes>
ConvShape describe(const Sizes& x, const Sizes& out, const Ints& stride, const Ints& padding, const Ints& dilation,
                   int64_t groups) {
  STD_TORCH_CHECK(x.size() == 4 || x.size() == 5, kOp, ": x must have 4 or 5 axes, got ", x.size());
  STD_TORCH_CHECK(out.size() == 6, kOp, ": out must have 6 axes, got ", out.size());
  for (const Ints* pair : {&stride, &padding, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, kOp, ": stride, padding and dilation must be pairs, got ", to_string(*pair));
  const size_t d = x.size();
  STD_TORCH_CHECK(groups >= 1 && out[1] % groups == 0, kOp, ": groups must divide the ", out[1],
                  " output channels, got ", groups);
  ConvShape s{out[0], 1, x[d - 4], groups, out[2], out[1] / groups, {}, {}, {}, {}, {}, d == 4};
  for (int axis : {0, 1}) {
    STD_TORCH_CHECK(stride[axis] >= 1 && padding[axis] >= 0 && dilation[axis] >= 1, kOp,
                    ": stride and dilation must be at least 1 and padding at least 0, got ", to_string(stride), ", ",
                    to_string(dilation), " and ", to_string(padding));
    s.size[axis] = x[d - 2 + axis];
    s.kernel[axis] = out[3 + axis];
    s.stride[axis] = stride[axis];
    s.padding[axis] = padding[axis];
    s.dilation[axis] = dilation[axis];
    STD_TORCH_CHECK(s.kernel[axis] >= 1, kOp, ": the kernel must have taps, got out ", to_string(out));
  }
  STD_TORCH_CHECK(x[d - 3] == groups * s.in_channels && (s.shared_input || x[0] == s.branches), kOp,
                  ": x must match out ", to_string(out), " in branches and channels, got ", to_string(x));
  STD_TORCH_CHECK(s.samples > 0 ? out[5] % s.samples == 0 : out[5] == 0, kOp, ": out must have a multiple of the ",
                  s.samples, " samples of x, got ", to_string(out));
  return s;
}

void conv2d_weight_grad_per_sample_out(const Tensor& x, const Tensor& grad, Tensor out, Ints stride, Ints padding,
                                       Ints dilation, int64_t groups) {
  const ConvShape s = describe(x.sizes(), out.sizes(), stride, padding, dilation, groups);
  const int64_t samples = out.size(5);
  check_size(kOp, "grad", grad, {s.branches, samples, groups * s.out_channels, s.out_size(0), s.out_size(1)});
  check_kinds(kOp, x, grad, out);
  STD_TORCH_CHECK(out.is_contiguous(), kOp, ": out must be contiguous, got strides ", to_string(out.strides()));
  if (out.numel() == 0) return;
  if (grad.numel() == 0) {  // sums over no positions
    std::memset(out.mutable_data_ptr(), 0, size_t(out.numel()) * (x.scalar_type() == ScalarType::Float ? 4 : 8));
    return;
  }
  check_batch_last(x, kOp, "x");
  check_batch_last(grad, kOp, "grad");
  const SampleGradPlan plan{s, samples / s.samples};
  x.scalar_type() == ScalarType::Float ? run_sample_grad<float>(plan, x, grad, out)
                                       : run_sample_grad<double>(plan, x, grad, out);
}

}  // namespace
}  // namespace bsfast

STABLE_TORCH_LIBRARY_IMPL(bsfast, CPU, library) {
  library.impl("conv2d_weight_grad_per_sample_out", TORCH_BOX(&bsfast::conv2d_weight_grad_per_sample_out));
}
