// The sizes of a convolution from those of the tensors that its operators are given, and checks of these.
#pragma once

#include "operands.h"
#include "shape.h"

namespace bsfast {

// Sizes of a convolution with input `x_size` ((M, N, C, H, W), or (N, C, H, W) if shared) and weights, or a gradient of
// these that may have another axis, `w_size`.
template <class Sizes>
ConvShape describe(const char* op, const Sizes& x_size, const Sizes& w_size, const Ints& stride, const Ints& padding,
                   const Ints& dilation, int64_t groups, const char* w_name = "weight", size_t w_axes = 5) {
  STD_TORCH_CHECK(x_size.size() == 4 || x_size.size() == 5, op, ": x must have 4 or 5 axes, got ", x_size.size());
  STD_TORCH_CHECK(w_size.size() == w_axes, op, ": ", w_name, " must have ", w_axes, " axes, got ", w_size.size());
  for (const Ints* pair : {&stride, &padding, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, op, ": stride, padding and dilation must be pairs, got ", to_string(*pair));
  const size_t d = x_size.size();
  for (int axis : {0, 1})
    STD_TORCH_CHECK(stride[axis] >= 1 && padding[axis] >= 0 && dilation[axis] >= 1, op,
                    ": stride and dilation must be at least 1 and padding at least 0, got ", to_string(stride), ", ",
                    to_string(dilation), " and ", to_string(padding));
  STD_TORCH_CHECK(groups >= 1 && w_size[1] % groups == 0, op, ": groups must divide the ", w_size[1],
                  " output channels, got ", groups);
  ConvShape s{w_size[0], 1, x_size[d - 4], groups, w_size[2], w_size[1] / groups, {}, {}, {}, {}, {}, d == 4};
  for (int axis : {0, 1}) {
    s.size[axis] = x_size[d - 2 + axis];
    s.kernel[axis] = w_size[3 + axis];
    s.stride[axis] = stride[axis];
    s.padding[axis] = padding[axis];
    s.dilation[axis] = dilation[axis];
    STD_TORCH_CHECK(s.kernel[axis] >= 1, op, ": the kernel must have taps, got ", w_name, " ", to_string(w_size));
  }
  STD_TORCH_CHECK(x_size[d - 3] == groups * s.in_channels && (s.shared_input || x_size[0] == s.branches), op,
                  ": x must match ", w_name, " ", to_string(w_size), " in branches and channels, got ",
                  to_string(x_size));
  return s;
}

inline Ints result_size(const ConvShape& s) {
  return {s.branches, s.samples, s.groups * s.out_channels, s.out_size(0), s.out_size(1)};
}

inline void check_weight(const char* op, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(weight.dim() == 5 && weight.is_contiguous(), op, ": ", name,
                  " must be contiguous with shape (M, C_out, C_in / groups, kH, kW), got ", to_string(weight.sizes()));
}

// Sizes of the convolution of which `out` is the weight gradient of every sample; checks `grad` and `out`.
inline ConvShape describe_per_sample(const char* op, const Tensor& x, const Tensor& grad, const Tensor& out,
                                     const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  const ConvShape s = describe(op, x.sizes(), out.sizes(), stride, padding, dilation, groups, "out", 6);
  const int64_t samples = out.size(5);
  STD_TORCH_CHECK(s.samples > 0 ? samples % s.samples == 0 : samples == 0, op, ": out must have a multiple of the ",
                  s.samples, " samples of x, got ", to_string(out.sizes()));
  check_size(op, "grad", grad, {s.branches, samples, groups * s.out_channels, s.out_size(0), s.out_size(1)});
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous, got strides ", to_string(out.strides()));
  return s;
}

// Checks the coefficients with which x is read.
inline void check_prologue(const char* op, const ConvShape& s, ScalarType dtype, const Optional& scale,
                           const Optional& shift) {
  STD_TORCH_CHECK(scale.has_value() == shift.has_value() && !(scale && s.shared_input), op,
                  ": scale and shift must be given together, and not for a shared x");
  for (const Optional* t : {&scale, &shift})
    if (*t) check_channels(op, "scale and shift", **t, s.branches, s.groups * s.in_channels, dtype);
}

// Checks what a convolution's result is multiplied by and added to, and its statistics.
inline void check_of_result(const char* op, const ConvShape& s, ScalarType dtype, const Optional& out_scale,
                            const Optional& bias, const Optional& mean, const Optional& variance) {
  STD_TORCH_CHECK(mean.has_value() == variance.has_value(), op, ": mean and variance must be given together");
  for (const Optional* t : {&out_scale, &bias, &mean, &variance})
    if (*t) check_channels(op, "out_scale, bias, mean and variance", **t, s.branches, s.groups * s.out_channels, dtype);
}

}  // namespace bsfast
