// Normalisation of each sample over groups of its channels (instance and group normalisation), an affine map and an
// activation, one version per instruction set.
#pragma once

#include "isa.h"
#include "shape.h"

namespace bsfast {

// `image` is H W. Activations are [M][C][H][W][N] if batch-last, else [M][N][C][H][W]; whatever there is one of for
// each sample and channel, or for each sample and group, has the same order without H and W.
struct SampleNormShape {
  int64_t branches, samples, channels, groups, image;
  bool batch_last;

  int64_t group_channels() const { return channels / groups; }
};

// y = act(scale (x - mean) inv + shift), with mean and inv = 1 / sqrt(variance + eps) of each group of channels of each
// sample; act multiplies negative values by `slope`: 1 is no activation, 0 is ReLU.
template <class T>
struct SampleNormForward {
  const T *x, *scale, *shift;  // scale and shift [M, C], or for each sample and channel, or null
  T* y;
  double *mean, *inv, *variance;  // for each sample and group; the variance is divided by the number of elements
  double eps, slope;
  bool scale_per_sample, shift_per_sample;
};

// Gradients of the above; y is read where slope is not 1, and then slope must not be negative.
template <class T>
struct SampleNormBackward {
  const T *x, *y, *grad, *scale;
  const double *mean, *inv;
  T *x_grad, *scale_grad, *shift_grad;  // the latter for each sample and channel
  double slope;
  bool scale_per_sample;
};

template <class T>
struct SampleNorm {
  // Units of parallel work: samples (or vectors of samples, if batch-last) times groups times branches.
  int64_t (*units)(const SampleNormShape&);
  // Compute the units [begin, end).
  void (*forward)(const SampleNormShape&, const SampleNormForward<T>&, int64_t begin, int64_t end);
  void (*backward)(const SampleNormShape&, const SampleNormBackward<T>&, int64_t begin, int64_t end);
};

BSFAST_KERNEL(SampleNorm, sample_norm)

}  // namespace bsfast
