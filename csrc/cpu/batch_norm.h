// Batch normalisation with the statistics of the batch, a residual and a ReLU, one version per instruction set.
#pragma once

#include "isa.h"
#include "shape.h"

namespace bsfast {

// A channel of a branch is `repeats` pieces of `length` elements; what is in between belongs to other channels. On
// batch-last memory it is one piece of H W N elements, on contiguous memory N pieces of H W.
struct ChannelShape {
  int64_t branches, repeats, channels, length;

  int64_t units() const { return branches * channels; }
};

// y = act(scale x + shift + residual) with scale = weight inv, shift = bias - mean scale, inv = 1 / sqrt(variance +
// eps) and mean and variance of each channel of each branch over all its elements; act is ReLU or nothing. A channel of
// a branch is a unit of parallel work.
template <class T>
struct BatchNormForward {
  const T *x, *weight, *bias, *residual;  // weight and bias [M, C] or null; residual as x, or null
  T* y;                                   // null: statistics and coefficients only
  T *mean, *variance;                     // [M, C]; the variance is divided by the number of elements
  T *scale, *shift, *inv;                 // [M, C]
  double eps;
  bool relu;
  bool known;  // mean and variance are given
};

// Gradients of the above. With a ReLU, the gradient passes where y > 0; that is also the residual's gradient. Without
// a residual y may be null: it is then computed again.
template <class T>
struct BatchNormBackward {
  const T *x, *y, *grad, *mean, *scale, *shift, *inv;
  T *x_grad, *weight_grad, *bias_grad;  // weight's and bias's [M, C]; x's may be grad
  T* residual_grad;                     // as x, or null
  bool relu;
};

template <class T>
struct BatchNorm {
  // Compute the units [begin, end).
  void (*forward)(const ChannelShape&, const BatchNormForward<T>&, int64_t begin, int64_t end);
  void (*backward)(const ChannelShape&, const BatchNormBackward<T>&, int64_t begin, int64_t end);
};

BSFAST_KERNEL(BatchNorm, batch_norm)

}  // namespace bsfast
