// The sizes of a convolution from those of the tensors that its operators are given, and checks of these.
#pragma once

#include "operands.h"
#include "shape.h"

namespace bsfast {

// Sizes of a convolution with input `x_size` ((M, N, C, H, W), or (N, C, H, W) if shared) and weights `w_size`.
template <class Sizes>
ConvShape describe(const char* op, const Sizes& x_size, const Sizes& w_size, const Ints& stride, const Ints& padding,
                   const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(x_size.size() == 4 || x_size.size() == 5, op, ": x must have 4 or 5 axes, got ", x_size.size());
  STD_TORCH_CHECK(w_size.size() == 5, op, ": weight must have 5 axes, got ", w_size.size());
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
    STD_TORCH_CHECK(s.kernel[axis] >= 1, op, ": the kernel must have taps, got weight ", to_string(w_size));
  }
  STD_TORCH_CHECK(x_size[d - 3] == groups * s.in_channels && (s.shared_input || x_size[0] == s.branches), op,
                  ": x must match weight ", to_string(w_size), " in branches and channels, got ", to_string(x_size));
  return s;
}

inline Ints result_size(const ConvShape& s) {
  return {s.branches, s.samples, s.groups * s.out_channels, s.out_size(0), s.out_size(1)};
}

inline void check_weight(const char* op, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(weight.dim() == 5 && weight.is_contiguous(), op, ": ", name,
                  " must be contiguous with shape (M, C_out, C_in / groups, kH, kW), got ", to_string(weight.sizes()));
}

}  // namespace bsfast
