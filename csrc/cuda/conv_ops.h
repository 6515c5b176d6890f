// The convolution operators that bsfast/ops declares, on CUDA: checks, choice of the kernel, its start. Host code.
//
// A `Device` is made from an operator's name and a tensor: it makes that tensor's device current as long as it lives,
// says whether has_matrix_units(), and is the launcher that the plans call. Of what the CPU's operators do around a
// convolution nothing is done here; bsfast/ops/backend.py knows that.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>

#include "conv_operands.h"
#include "cuda/conv_matrix_plan.h"

namespace bsfast::cuda {

inline void check_operands(const char* op, const Tensor& a, const Tensor& b, const Tensor& c) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() == c.scalar_type(), op,
                  ": all tensors must have one dtype");
  STD_TORCH_CHECK(a.get_device_index() == b.get_device_index() && a.get_device_index() == c.get_device_index() &&
                      a.is_cuda() == b.is_cuda() && a.is_cuda() == c.is_cuda(),
                  op, ": all tensors must be on one device");
}

inline void refuse(const char* op, bool given, const char* what) {
  STD_TORCH_CHECK(!given, op, ": ", what, " must be left out on CUDA; the operators around a convolution do it");
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

template <class Device>
void gather(const Device& device, const char* op, const ConvShape& s, bool transposed, const Tensor& source,
            const Tensor& weight, const Tensor& target) {
  with_storage(op, source, [&](auto zero) {
    using T = decltype(zero);
    const auto a = gather_arguments<T>(s, transposed, data<T>(source), data<T>(weight), result<T>(target));
    if constexpr (sizeof(T) == 2)
      if (device.has_matrix_units())
        if (const auto m = matrix_arguments(a)) return conv_gather_matrix(s, *m, device);
    conv_gather(s, a, device);
  });
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
  refuse(op, winograd != 0, "winograd");
  refuse(op, scale || shift || rectify, "scale, shift and rectify");
  refuse(op, out_scale || bias || residual || relu || mask, "out_scale, bias, residual, relu and mask");
  refuse(op, mean || variance, "mean and variance");
  if (out.numel() == 0) return;
  check_batch_last(x, op, "x");
  check_batch_last(out, op, "out");
  gather(Device(op, x), op, s, false, x, weight, out);
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
  refuse(op, winograd != 0, "winograd");
  refuse(op, residual || mask, "residual and mask");
  if (out.numel() == 0) return;
  check_batch_last(grad, op, "grad");
  check_batch_last(out, op, "out");
  gather(Device(op, grad), op, s, true, grad, weight, out);
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
  refuse(op, winograd != 0, "winograd");
  refuse(op, scale || shift || rectify, "scale, shift and rectify");
  refuse(op, patches, "patches");
  if (out.numel() == 0) return;
  check_batch_last(x, op, "x");
  check_batch_last(grad, op, "grad");
  const Device device(op, x);
  with_storage(op, x, [&](auto zero) {
    using T = decltype(zero);
    auto a = weight_grad_arguments<T>(s, data<T>(x), data<T>(grad));
    // Freed in the order of the stream, so that it may be before the kernels have run.
    const Ints size{a.parts, out.numel()};
    const Tensor partial = torch::stable::new_empty(out, size, ScalarType::Float);
    a.partial = result<float>(partial);
    conv_weight_grad(s, a, result<T>(out), device);
  });
}

}  // namespace bsfast::cuda
