// The batch normalisation operators that bsfast/ops declares, on LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include "cpu/batch_norm.h"
#include "cpu/tensors.h"

namespace bsfast {
namespace {

// Checks that all are activations of one shape, dtype and memory order, and describes their channels.
ChannelShape describe_channels(const char* op, const std::vector<const Tensor*>& activations) {
  const Tensor& first = *activations[0];
  STD_TORCH_CHECK(first.dim() == 5, op, ": x must have shape (M, N, C, H, W), got ", to_string(first.sizes()));
  bool contiguous = true;
  for (const Tensor* t : activations) {
    check_size(op, "every activation", *t, Ints(first.sizes().begin(), first.sizes().end()));
    check_kinds(op, first, *t, *t);
    contiguous = contiguous && t->is_contiguous();
  }
  for (const Tensor* t : activations)
    if (!contiguous) check_batch_last(*t, op, "every activation");
  const int64_t image = first.size(3) * first.size(4), samples = first.size(1);
  return {first.size(0), contiguous ? samples : 1, first.size(2), contiguous ? image : image * samples};
}

template <class T>
const BatchNorm<T>& batch_norm_kernel(const char* op) {
  static const BatchNorm<T> kernel = batch_norm<T>(chosen_isa(op));
  return kernel;
}

void check_statistics(const char* op, const Tensor& x, std::initializer_list<const Tensor*> statistics) {
  for (const Tensor* t : statistics)
    check_channels(op, "every statistic and coefficient", *t, x.size(0), x.size(2), x.scalar_type());
}

void batch_norm_out(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual,
                    const Optional& y, Tensor mean, Tensor variance, Tensor scale, Tensor shift, Tensor inv, double eps,
                    bool relu, bool known) {
  constexpr const char* op = "batch_norm_out";
  std::vector<const Tensor*> activations{&x};
  for (const Optional* t : {&y, &residual})
    if (*t) activations.push_back(&**t);
  const ChannelShape s = describe_channels(op, activations);
  check_statistics(op, x, {&mean, &variance, &scale, &shift, &inv});
  for (const Optional* t : {&weight, &bias})
    if (*t) check_statistics(op, x, {&**t});
  if (x.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const BatchNormForward<T> a{data<T>(x),
                                data_or_null<T>(weight),
                                data_or_null<T>(bias),
                                data_or_null<T>(residual),
                                y ? result<T>(*y) : nullptr,
                                result<T>(mean),
                                result<T>(variance),
                                result<T>(scale),
                                result<T>(shift),
                                result<T>(inv),
                                eps,
                                relu,
                                known};
    const auto& kernel = batch_norm_kernel<T>(op);
    if (!y && known) return kernel.forward(s, a, 0, s.units());  // no element is read
    torch::stable::parallel_for(0, s.units(), 1, [&](int64_t begin, int64_t end) { kernel.forward(s, a, begin, end); });
  };
  x.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
}

void batch_norm_grad_out(const Tensor& x, const Optional& y, const Tensor& grad, const Tensor& mean,
                         const Tensor& scale, const Tensor& shift, const Tensor& inv, Tensor x_grad, Tensor weight_grad,
                         Tensor bias_grad, const Optional& residual_grad, bool relu) {
  constexpr const char* op = "batch_norm_grad_out";
  std::vector<const Tensor*> activations{&x, &grad, &x_grad};
  for (const Optional* t : {&y, &residual_grad})
    if (*t) activations.push_back(&**t);
  const ChannelShape s = describe_channels(op, activations);
  check_statistics(op, x, {&mean, &scale, &shift, &inv, &weight_grad, &bias_grad});
  if (x.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const BatchNormBackward<T> a{data<T>(x),
                                 data_or_null<T>(y),
                                 data<T>(grad),
                                 data<T>(mean),
                                 data<T>(scale),
                                 data<T>(shift),
                                 data<T>(inv),
                                 result<T>(x_grad),
                                 result<T>(weight_grad),
                                 result<T>(bias_grad),
                                 residual_grad ? result<T>(*residual_grad) : nullptr,
                                 relu};
    const auto& kernel = batch_norm_kernel<T>(op);
    torch::stable::parallel_for(0, s.units(), 1,
                                [&](int64_t begin, int64_t end) { kernel.backward(s, a, begin, end); });
  };
  x.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
}

}  // namespace
}  // namespace bsfast

STABLE_TORCH_LIBRARY_IMPL(bsfast, CPU, library) {
  library.impl("batch_norm_out", TORCH_BOX(&bsfast::batch_norm_out));
  library.impl("batch_norm_grad_out", TORCH_BOX(&bsfast::batch_norm_grad_out));
}
