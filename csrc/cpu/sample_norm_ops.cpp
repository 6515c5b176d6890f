// The sample normalisation operators that bsfast/ops declares, on LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include "cpu/sample_norm.h"
#include "cpu/tensors.h"

namespace bsfast {
namespace {

// Checks that all are activations of one shape, dtype and memory order, and describes them.
SampleNormShape describe_samples(const char* op, std::initializer_list<const Tensor*> activations, int64_t groups) {
  const Tensor& x = **activations.begin();
  STD_TORCH_CHECK(x.dim() == 5, op, ": x must have shape (M, N, C, H, W), got ", to_string(x.sizes()));
  STD_TORCH_CHECK(groups > 0 && x.size(2) % groups == 0, op, ": groups must divide C=", x.size(2), ", got ", groups);
  bool contiguous = true;
  for (const Tensor* t : activations) {
    check_size(op, "every activation", *t, Ints(x.sizes().begin(), x.sizes().end()));
    check_kinds(op, x, *t, *t);
    contiguous = contiguous && t->is_contiguous();
  }
  for (const Tensor* t : activations)
    if (!contiguous) check_batch_last(*t, op, "every activation");
  return {x.size(0), x.size(1), x.size(2), groups, x.size(3) * x.size(4), !contiguous};
}

// Checks what there is one of for each sample and `count` channels or groups; it has the memory order of x.
void check_per_sample(const char* op, const char* name, const SampleNormShape& s, int64_t count, ScalarType dtype,
                      const Tensor& t) {
  check_size(op, name, t, s.batch_last ? Ints{s.branches, count, s.samples} : Ints{s.branches, s.samples, count});
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == dtype, op, ": ", name,
                  " must be contiguous and have the right dtype");
}

// As above, or one for each channel of a branch. Returns whether it is for each sample.
bool check_coefficient(const char* op, const char* name, const SampleNormShape& s, ScalarType dtype,
                       const Optional& t) {
  if (!t.has_value()) return false;
  const bool per_sample = t->dim() == 3;
  if (per_sample) {
    check_per_sample(op, name, s, s.channels, dtype, *t);
  } else {
    check_size(op, name, *t, {s.branches, s.channels});
    STD_TORCH_CHECK(t->is_contiguous() && t->scalar_type() == dtype, op, ": ", name,
                    " must be contiguous and have x's dtype");
  }
  return per_sample;
}

template <class T>
const SampleNorm<T>& sample_norm_kernel(const char* op) {
  static const SampleNorm<T> kernel = sample_norm<T>(chosen_isa(op));
  return kernel;
}

void sample_norm_out(const Tensor& x, const Optional& scale, const Optional& shift, Tensor y, Tensor mean, Tensor inv,
                     Tensor variance, int64_t groups, double eps, double slope) {
  constexpr const char* op = "sample_norm_out";
  const SampleNormShape s = describe_samples(op, {&x, &y}, groups);
  const ScalarType dtype = x.scalar_type();
  for (const Tensor* t : {&mean, &inv, &variance})
    check_per_sample(op, "every statistic", s, groups, ScalarType::Double, *t);
  const bool scale_per_sample = check_coefficient(op, "scale", s, dtype, scale);
  const bool shift_per_sample = check_coefficient(op, "shift", s, dtype, shift);
  if (x.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const SampleNormForward<T> a{data<T>(x),
                                 data_or_null<T>(scale),
                                 data_or_null<T>(shift),
                                 result<T>(y),
                                 result<double>(mean),
                                 result<double>(inv),
                                 result<double>(variance),
                                 eps,
                                 slope,
                                 scale_per_sample,
                                 shift_per_sample};
    const auto& kernel = sample_norm_kernel<T>(op);
    torch::stable::parallel_for(0, kernel.units(s), 1,
                                [&](int64_t begin, int64_t end) { kernel.forward(s, a, begin, end); });
  };
  dtype == ScalarType::Float ? run(0.0f) : run(0.0);
}

void sample_norm_grad_out(const Tensor& x, const Tensor& y, const Tensor& grad, const Optional& scale,
                          const Tensor& mean, const Tensor& inv, Tensor x_grad, Tensor scale_grad, Tensor shift_grad,
                          int64_t groups, double slope) {
  constexpr const char* op = "sample_norm_grad_out";
  const SampleNormShape s = describe_samples(op, {&x, &y, &grad, &x_grad}, groups);
  const ScalarType dtype = x.scalar_type();
  for (const Tensor* t : {&mean, &inv}) check_per_sample(op, "every statistic", s, groups, ScalarType::Double, *t);
  check_per_sample(op, "scale_grad", s, s.channels, dtype, scale_grad);
  check_per_sample(op, "shift_grad", s, s.channels, dtype, shift_grad);
  const bool scale_per_sample = check_coefficient(op, "scale", s, dtype, scale);
  if (x.numel() == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const SampleNormBackward<T> a{
        data<T>(x),        data<T>(y),        data<T>(grad),         data_or_null<T>(scale), data<double>(mean),
        data<double>(inv), result<T>(x_grad), result<T>(scale_grad), result<T>(shift_grad),  slope,
        scale_per_sample};
    const auto& kernel = sample_norm_kernel<T>(op);
    torch::stable::parallel_for(0, kernel.units(s), 1,
                                [&](int64_t begin, int64_t end) { kernel.backward(s, a, begin, end); });
  };
  dtype == ScalarType::Float ? run(0.0f) : run(0.0);
}

}  // namespace
}  // namespace bsfast

STABLE_TORCH_LIBRARY_IMPL(bsfast, CPU, library) {
  library.impl("sample_norm_out", TORCH_BOX(&bsfast::sample_norm_out));
  library.impl("sample_norm_grad_out", TORCH_BOX(&bsfast::sample_norm_grad_out));
}
