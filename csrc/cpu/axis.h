// One axis of a convolution or of its transpose as sums over shifted positions. A convolution of stride s reads source
// s * (q + shift) + phase at target q, with s phases; its transpose writes target s * q + class from source q + shift,
// with s classes. Written this way both are sums of vectors at fixed distances, whatever stride and dilation.
#pragma once

#include <cstdint>

namespace bsfast {

struct Tap {
  int64_t kernel;  // position in the kernel
  int64_t shift;   // source position relative to the target's
  int64_t phase;   // residue of the source index
};

struct Axis {
  int64_t source, target;   // sizes
  int64_t phases, classes;  // one of them is the stride, the other 1
  int64_t low, high;        // smallest and largest shift
  // Plain arrays: kernels compiled for one instruction set must not instantiate templates that others share.
  const Tap* taps;       // class by class, each in the order of its sources, rising or falling
  const int64_t* first;  // index of each class's first tap; classes + 1 entries

  // Of a convolution, or of its transpose with the sizes of source and target exchanged.
  Axis(int64_t source, int64_t target, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
       bool transposed);
  ~Axis();
  Axis(const Axis&) = delete;
  Axis& operator=(const Axis&) = delete;

  // Number of taps of a class.
  int64_t count(int64_t residue) const { return first[residue + 1] - first[residue]; }

  // Number of targets of a class.
  int64_t targets(int64_t residue) const { return (target - residue + classes - 1) / classes; }
};

}  // namespace bsfast
