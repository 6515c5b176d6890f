// Convolution and its input gradient of M branches, one version per instruction set.
#pragma once

#include <cstddef>

#include "cpu/around.h"
#include "cpu/axis.h"
#include "isa.h"
#include "shape.h"

namespace bsfast {

// Both are sums over shifted source rows (axis.h): of the input for a convolution, of the output's gradient for its
// transpose. Target rows of all images, in the order (branch, repeat, group, chunk of samples, row), are the units of
// parallel work.
struct GatherPlan {
  ConvShape shape;
  bool transposed;
  Axis rows, columns;

  GatherPlan(const ConvShape& shape, bool transposed)
      : shape(shape), transposed(transposed), rows(axis(shape, transposed, 0)), columns(axis(shape, transposed, 1)) {}

  int64_t source_channels() const { return transposed ? shape.out_channels : shape.in_channels; }
  int64_t target_channels() const { return transposed ? shape.in_channels : shape.out_channels; }

 private:
  static Axis axis(const ConvShape& s, bool transposed, int i) {
    const int64_t in = s.size[i], out = s.out_size(i);
    return {transposed ? out : in, transposed ? in : out, s.kernel[i], s.stride[i],
            s.padding[i],          s.dilation[i],         transposed};
  }
};

template <class T>
struct GatherOperands {
  const T* source;     // [M or 1, repeats, channels, rows, columns, samples]
  const T* weight;     // [M, groups * C_out, C_in, kH, kW]
  T* target;           // as source, with the target's channels and sizes
  Prologue<T> before;  // none for a shared source
  Epilogue<T> after;   // no moments of a transpose
};

template <class T>
struct Gather {
  int64_t (*units)(const GatherPlan&);         // how many units of work there are
  int64_t (*slices)(const GatherPlan&);        // units of an image's group; of the moments
  size_t (*scratch_bytes)(const GatherPlan&);  // memory that one worker needs, 64-byte aligned
  // Computes the units [begin, end).
  void (*run)(const GatherPlan&, const GatherOperands<T>&, void* scratch, int64_t begin, int64_t end);
};

BSFAST_KERNEL(Gather, gather)

}  // namespace bsfast
