// Weight gradient of the convolution of M branches, one version per instruction set.
#pragma once

#include <cstddef>

#include "cpu/around.h"
#include "cpu/axis.h"
#include "isa.h"
#include "shape.h"

namespace bsfast {

struct WeightGradPlan {
  ConvShape shape;
  Axis rows, columns;

  explicit WeightGradPlan(const ConvShape& s)
      : shape(s),
        rows(s.size[0], s.out_size(0), s.kernel[0], s.stride[0], s.padding[0], s.dilation[0], false),
        columns(s.size[1], s.out_size(1), s.kernel[1], s.stride[1], s.padding[1], s.dilation[1], false) {}
};

// Each part of a branch's output rows gives one partial sum; the parts depend on the shape alone, so that the result
// does not depend on the number of workers. A part of a group of a branch is a unit of parallel work.
template <class T>
struct WeightGrad {
  int64_t (*parts)(const WeightGradPlan&);  // of each branch
  int64_t (*units)(const WeightGradPlan&);
  size_t (*scratch_bytes)(const WeightGradPlan&);  // memory that one worker needs, 64-byte aligned
  // Computes the units [begin, end).
  void (*run)(const WeightGradPlan&, const T* x,  // [M or 1, repeats, groups * C_in, H, W, samples]
              const Prologue<T>& before,          // of x; none if x is shared
              const T* grad,                      // [M, repeats, groups * C_out, H_out, W_out, samples]
              T* partial,                         // [parts, M, groups * C_out, C_in, kH, kW]
              void* scratch, int64_t begin, int64_t end);
};

BSFAST_KERNEL(WeightGrad, weight_grad)          // samples and columns in the vector lanes
BSFAST_KERNEL(WeightGrad, weight_grad_patches)  // patches of the input; the columns' dilation is 1

}  // namespace bsfast
