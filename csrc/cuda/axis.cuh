// One axis of a convolution or of its transpose as sums over shifted positions. A convolution reads source
// stride * q + offset at target q; its transpose, whose source is the output's gradient, writes target
// stride * q + residue from source q + offset: each residue is a class of targets with taps of its own. The taps of a
// class are an arithmetic progression in both, so that no table is needed.
#pragma once

#include "cuda/device.cuh"

namespace bsfast {

struct Axis {
  int source, target;  // sizes
  int kernel, stride, padding, dilation;
  bool transposed;

  // Distance in the source between neighbours of a class.
  __host__ __device__ int step() const { return transposed ? 1 : stride; }
  __host__ __device__ int classes() const { return transposed ? stride : 1; }
  // Number of targets of a class; the first has the most.
  __host__ __device__ int targets(int residue) const { return (target - residue + classes() - 1) / classes(); }
};

// The taps of one class, in the order of rising offsets: tap t is kernel position first + t * kernel_step and reads at
// offset low + t * offset_step.
struct Taps {
  int count, first, kernel_step, low, offset_step;
};

__host__ __device__ inline Taps taps_of(const Axis& axis, int residue) {
  if (!axis.transposed) return {axis.kernel, 0, 1, -axis.padding, axis.dilation};
  // Kernel position k belongs to the class if stride divides residue + padding - dilation * k.
  const int at = residue + axis.padding;
  int period = 1;
  while (axis.dilation * period % axis.stride != 0) ++period;
  int first = 0;
  while (first < period && (at - axis.dilation * first) % axis.stride != 0) ++first;
  if (first == period || first >= axis.kernel) return {0, 0, 0, 0, 0};
  const int count = (axis.kernel - 1 - first) / period + 1, last = first + (count - 1) * period;
  return {count, last, -period, (at - axis.dilation * last) / axis.stride, axis.dilation * period / axis.stride};
}

}  // namespace bsfast
