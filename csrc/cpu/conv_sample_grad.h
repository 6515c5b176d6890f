// Weight gradient of every sample by itself, for the convolution of M branches; one version per instruction set.
#pragma once

#include <cstddef>

#include "isa.h"
#include "shape.h"

namespace bsfast {

// The samples must be innermost in memory (repeats = 1). The output's gradient may hold several seeds, that is several
// gradients of every sample of the input: its sample r * samples + n is seed r of sample n.
struct SampleGradPlan {
  ConvShape shape;
  int64_t seeds;
};

// A unit of parallel work is one group of one branch, for some samples and some seeds.
template <class T>
struct SampleGrad {
  int64_t (*units)(const SampleGradPlan&);
  size_t (*scratch_bytes)(const SampleGradPlan&);  // memory that one worker needs, 64-byte aligned
  // Computes the units [begin, end).
  void (*run)(const SampleGradPlan&, const T* x,  // [M or 1, groups * C_in, H, W, samples]
              const T* grad,                      // [M, groups * C_out, H_out, W_out, seeds * samples]
              T* out,                             // [M, groups * C_out, C_in, kH, kW, seeds * samples]
              void* scratch, int64_t begin, int64_t end);
};

BSFAST_KERNEL(SampleGrad, sample_grad)

}  // namespace bsfast
