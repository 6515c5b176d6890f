// What a convolution does with its source as it reads it, and with its result before it stores it. All coefficients
// are float, whatever the storage type.
#pragma once

#include "cuda/device.cuh"

namespace bsfast {

// Reads act(scale x + shift) instead of x, with act ReLU or nothing; the padding stays zero.
struct Normalise {
  const float *scale, *shift;  // [M or 1, groups * C_in], or null: x as it is
  bool relu;

  // Where there is a scale.
  BSFAST_DEVICE float operator()(float x, float own_scale, float own_shift) const {
    const float value = fmaf(x, own_scale, own_shift);  // as Triton's, whose masks are of the same value
    return relu ? maximum(value, 0.0f) : value;
  }
};

// Stores act(scale y + bias + residual) instead of y, and zeros where the mask is at most 0.
template <class T>
struct Epilogue {
  const float *scale, *bias;  // [M, groups * targets], or null: 1 and 0
  const T *residual, *mask;   // as the target, or null; the mask holds a ReLU's values, whose derivative it applies
  bool relu;

  BSFAST_DEVICE float scale_of(int64 channel) const { return scale != nullptr ? scale[channel] : 1.0f; }
  BSFAST_DEVICE float bias_of(int64 channel) const { return bias != nullptr ? bias[channel] : 0.0f; }

  // Finishes a vector of one channel of the target that begins at element `at`.
  template <int Count>
  BSFAST_DEVICE void finish(float (&y)[Count], int64 channel, int64 at) const {
    const float own_scale = scale_of(channel), own_bias = bias_of(channel);
    float other[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) y[i] = y[i] * own_scale + own_bias;
    if (residual != nullptr) {
      load(residual + at, other);
#pragma unroll
      for (int i = 0; i < Count; ++i) y[i] += other[i];
    }
    if (relu) {
#pragma unroll
      for (int i = 0; i < Count; ++i) y[i] = maximum(y[i], 0.0f);
    }
    if (mask != nullptr) {
      load(mask + at, other);
#pragma unroll
      for (int i = 0; i < Count; ++i) y[i] = other[i] <= 0 ? 0.0f : y[i];
    }
  }
};

}  // namespace bsfast
