// The convolution operators that bsfast/ops declares, on CUDA: checks, choice of the kernel, its start. Host code.
//
// A `Device` is made from an operator's name and a tensor: it makes that tensor's device current as long as it lives,
// says which matrix_units() it has, and is the launcher that the plans call.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>

#include "conv_operands.h"
#include "cuda/conv_matrix_plan.h"
#include "cuda/conv_sample_plan.h"
#include "cuda/conv_weight_grad_matrix_plan.h"
#include "cuda/statistics_plan.h"

namespace bsfast::cuda {

// Checks that all tensors are on one device.
inline void check_device(const char* op, const Tensor& first, std::initializer_list<const Optional*> others) {
  for (const Optional* t : others)
    STD_TORCH_CHECK(!*t || ((*t)->get_device_index() == first.get_device_index() && (*t)->is_cuda() == first.is_cuda()),
                    op, ": all tensors must be on one device");
}

inline void check_operands(const char* op, const Tensor& a, const Tensor& b, const Tensor& c) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() == c.scalar_type(), op,
                  ": all tensors must have one dtype");
  const Optional others[] = {b, c};
  check_device(op, a, {&others[0], &others[1]});
}

inline void refuse(const char* op, bool given, const char* what) {
  STD_TORCH_CHECK(!given, op, ": ", what, " must be left out on CUDA");
}

// Checks what is read beside a result: it has the result's shape, dtype, device and order in memory.
inline void check_beside(const char* op, const char* name, const Optional& other, const Tensor& out) {
  if (!other) return;
  check_size(op, name, *other, Ints(out.sizes().begin(), out.sizes().end()));
  check_operands(op, *other, out, out);
  check_batch_last(*other, op, name);
}

// Calls use(number of the kernels' type) for the dtype of a tensor.
template <class Use>
void with_storage(const char* op, const Tensor& t, Use use) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return use(0.0f);
    case ScalarType::Half:
      return use(bsfast::Half{});
    case ScalarType::BFloat16:
      return use(bsfast::BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float16 or bfloat16 on CUDA");
  }
}

// Starts a convolution or its transpose on the units that fit it; with `mean`, then the merging of its statistics.
template <class T, class Device>
void gather(const Device& device, const ConvShape& s, GatherArguments<T> a, const Tensor& target, const Optional& mean,
            const Optional& variance) {
  const auto described = [&](GatherArguments<T>& chosen, auto start) {
    if (!mean) return start();
    // Freed in the order of the stream, so that it may be before the kernels have run.
    const Ints size{mean->numel(), chosen.parts, 3};
    const Tensor partial = torch::stable::new_empty(target, size, ScalarType::Float);
    chosen.statistics = result<float>(partial);
    start();
    merge_statistics({chosen.statistics, result<float>(*mean), result<float>(*variance), size[0], chosen.parts},
                     device);
  };
  if constexpr (sizeof(T) == 2) {
    const MatrixUnits units = device.matrix_units();
    if (auto m = matrix_arguments(a, units))
      return described(m->gather, [&] { conv_gather_matrix(s, *m, units, device); });
  }
  described(a, [&] { conv_gather(s, a, device); });
}

template <class Device>
void conv2d_out(const Tensor& x, const Tensor& weight, Tensor out, Ints stride, Ints padding, Ints dilation,
                int64_t groups, int64_t winograd, const Optional& scale, const Optional& shift, bool rectify,
                const Optional& out_scale, const Optional& bias, const Optional& residual, bool relu,
                const Optional& mask, const Optional& mean, const Optional& variance) {
  constexpr const char* op = "conv2d_out";
  check_weight(op, weight, "weight");
  const ConvShape s = describe(op, x.sizes(), weight.sizes(), stride, padding, dilation, groups);
  check_size(op, "out", out, result_size(s));
  check_operands(op, x, weight, out);
  check_device(op, x, {&scale, &shift, &out_scale, &bias, &mean, &variance});
  check_prologue(op, s, ScalarType::Float, scale, shift);
  check_of_result(op, s, ScalarType::Float, out_scale, bias, mean, variance);
  check_beside(op, "residual", residual, out);
  check_beside(op, "mask", mask, out);
  refuse(op, winograd != 0, "winograd");
  if (out.numel() == 0) return;
  check_batch_last(x, op, "x");
  check_batch_last(out, op, "out");
  const Device device(op, x);
  with_storage(op, x, [&](auto zero) {
    using T = decltype(zero);
    const Normalise before{data_or_null<float>(scale), data_or_null<float>(shift), rectify};
    const Epilogue<T> after{data_or_null<float>(out_scale), data_or_null<float>(bias), data_or_null<T>(residual),
                            data_or_null<T>(mask), relu};
    const auto a = gather_arguments<T>(s, false, data<T>(x), data<T>(weight), result<T>(out), before, after);
    gather(device, s, a, out, mean, variance);
  });
}

template <class Device>
void conv2d_input_grad_out(const Tensor& grad, const Tensor& weight, Tensor out, Ints stride, Ints padding,
                           Ints dilation, int64_t groups, int64_t winograd, const Optional& residual,
                           const Optional& mask) {
  constexpr const char* op = "conv2d_input_grad_out";
  check_weight(op, weight, "weight");
  const ConvShape s = describe(op, out.sizes(), weight.sizes(), stride, padding, dilation, groups);
  check_size(op, "grad", grad, result_size(s));
  check_operands(op, grad, weight, out);
  check_beside(op, "residual", residual, out);
  check_beside(op, "mask", mask, out);
  refuse(op, winograd != 0, "winograd");
  if (out.numel() == 0) return;
  check_batch_last(grad, op, "grad");
  check_batch_last(out, op, "out");
  const Device device(op, grad);
  with_storage(op, grad, [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> after{nullptr, nullptr, data_or_null<T>(residual), data_or_null<T>(mask), false};
    const auto a = gather_arguments<T>(s, true, data<T>(grad), data<T>(weight), result<T>(out), {}, after);
    gather(device, s, a, out, {}, {});
  });
}

template <class Device>
void conv2d_weight_grad_out(const Tensor& x, const Tensor& grad, Tensor out, Ints stride, Ints padding, Ints dilation,
                            int64_t groups, int64_t winograd, const Optional& scale, const Optional& shift,
                            bool rectify, bool patches) {
  constexpr const char* op = "conv2d_weight_grad_out";
  check_weight(op, out, "out");
  const ConvShape s = describe(op, x.sizes(), out.sizes(), stride, padding, dilation, groups);
  check_size(op, "grad", grad, result_size(s));
  check_operands(op, x, grad, out);
  check_device(op, x, {&scale, &shift});
  check_prologue(op, s, ScalarType::Float, scale, shift);
  refuse(op, winograd != 0, "winograd");
  refuse(op, patches, "patches");
  if (out.numel() == 0) return;
  check_batch_last(x, op, "x");
  check_batch_last(grad, op, "grad");
  const Device device(op, x);
  with_storage(op, x, [&](auto zero) {
    using T = decltype(zero);
    const Normalise before{data_or_null<float>(scale), data_or_null<float>(shift), rectify};
    auto a = weight_grad_arguments<T>(s, data<T>(x), data<T>(grad), before);
    const auto start = [&](auto& arguments, WeightGradArguments<T>& sums) {
      const Ints size{sums.parts, out.numel()};
      const Tensor partial = torch::stable::new_empty(out, size, ScalarType::Float);
      sums.partial = result<float>(partial);
      conv_weight_grad(s, arguments, result<T>(out), device);
    };
    if constexpr (sizeof(T) == 2)
      if (auto m = matrix_arguments(a, device.matrix_units())) return start(*m, m->grad);
    start(a, a);
  });
}

template <class Device>
void conv2d_weight_grad_per_sample_out(const Tensor& x, const Tensor& grad, Tensor out, Ints stride, Ints padding,
                                       Ints dilation, int64_t groups) {
  constexpr const char* op = "conv2d_weight_grad_per_sample_out";
  const ConvShape s = describe_per_sample(op, x, grad, out, stride, padding, dilation, groups);
  check_operands(op, x, grad, out);
  if (out.numel() == 0) return;
  check_batch_last(x, op, "x");
  check_batch_last(grad, op, "grad");
  const Device device(op, x);
  with_storage(op, x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t seeds = out.size(5) / s.samples;
    conv_sample_grad(s, sample_grad_arguments<T>(s, seeds, data<T>(x), data<T>(grad), result<T>(out)), device);
  });
}

}  // namespace bsfast::cuda
