// The batch normalisation operators that bsfast/ops declares, on LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/batch_norm.h"
#include "cpu/tensors.h"

namespace bsfast {
namespace {

using Optional = std::optional<Tensor>;

template <class T>
const T* data_or_null(const Optional& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

// Checks that all are activations of one shape, dtype and memory order, and describes their channels.
ChannelShape describe_channels(const char* op, std::initializer_list<const Tensor*> activations) {
  const Tensor& first = **activations.begin();
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

// Checks that a tensor has one number for each channel of each branch.
void check_channels(const char* op, const char* name, const Tensor& x, const Tensor& t) {
  check_size(op, name, t, {x.size(0), x.size(2)});
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == x.scalar_type(), op, ": ", name,
                  " must be contiguous and have x's dtype");
}

template <class T>
const BatchNorm<T>& batch_norm_kernel(const char* op) {
  static const BatchNorm<T> kernel = batch_norm<T>(chosen_isa(op));
  return kernel;
}

void batch_norm_out(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual, Tensor y,
                    Tensor mean, Tensor inv, Tensor variance, double eps, bool relu) {
  constexpr const char* op = "batch_norm_out";
  const ChannelShape s = residual ? describe_channels(op, {&x, &y, &*residual}) : describe_channels(op, {&x, &y});
  for (const Tensor* t : {&mean, &inv, &variance}) check_channels(op, "every statistic", x, *t);
  if (weight) check_channels(op, "weight", x, *weight);
  if (bias) check_channels(op, "bias", x, *bias);
  if (x.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const BatchNormForward<T> a{data<T>(x),
                                data_or_null<T>(weight),
                                data_or_null<T>(bias),
                                data_or_null<T>(residual),
                                result<T>(y),
                                result<T>(mean),
                                result<T>(inv),
                                result<T>(variance),
                                eps,
                                relu};
    const auto& kernel = batch_norm_kernel<T>(op);
    torch::stable::parallel_for(0, s.units(), 1, [&](int64_t begin, int64_t end) { kernel.forward(s, a, begin, end); });
  };
  x.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
}

void batch_norm_grad_out(const Tensor& x, const Tensor& y, const Tensor& grad, const Optional& weight,
                         const Tensor& mean, const Tensor& inv, Tensor x_grad, Tensor weight_grad, Tensor bias_grad,
                         const Optional& residual_grad, bool relu) {
  constexpr const char* op = "batch_norm_grad_out";
  const ChannelShape s = residual_grad ? describe_channels(op, {&x, &y, &grad, &x_grad, &*residual_grad})
                                       : describe_channels(op, {&x, &y, &grad, &x_grad});
  for (const Tensor* t : std::initializer_list<const Tensor*>{&mean, &inv, &weight_grad, &bias_grad})
    check_channels(op, "every statistic", x, *t);
  if (weight) check_channels(op, "weight", x, *weight);
  if (x.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const BatchNormBackward<T> a{data<T>(x),
                                 data<T>(y),
                                 data<T>(grad),
                                 data_or_null<T>(weight),
                                 data<T>(mean),
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
