// Weight gradient of the convolution of M branches by Winograd's minimal filtering, one version per instruction set:
// kernels of 3x3 taps with stride and dilation 1, on batch-last memory.
#pragma once

#include <cstddef>

#include "cpu/around.h"
#include "cpu/axis.h"
#include "isa.h"
#include "shape.h"

namespace bsfast {

// The transpose of the convolution with respect to its weights: the same tiles and frequencies.
struct WinogradWeightGradPlan {
  ConvShape shape;
  int tile;                      // outputs of a tile along each axis: 2 or 4
  Axis rows, columns;            // of the input; a tile is taken as one target whose taps are all rows it reads
  Axis grad_rows, grad_columns;  // of the gradient, likewise

  WinogradWeightGradPlan(const ConvShape& s, int tile)
      : shape(s),
        tile(tile),
        rows(s.size[0], whole(s, tile, 0), tile + 2, 1, s.padding[0], 1, false),
        columns(s.size[1], whole(s, tile, 1), 3, 1, s.padding[1], 1, false),
        grad_rows(s.out_size(0), whole(s, tile, 0), tile, 1, 0, 1, false),
        grad_columns(s.out_size(1), whole(s, tile, 1), 1, 1, 0, 1, false) {}

 private:
  static int64_t whole(const ConvShape& s, int64_t tile, int i) { return (s.out_size(i) + tile - 1) / tile * tile; }
};

// Each part of a branch's rows of tiles gives one partial sum; the parts depend on the shape alone, so that the result
// does not depend on the number of workers. A part of a group of a branch is a unit of parallel work.
template <class T>
struct WinogradWeightGrad {
  int64_t (*parts)(const WinogradWeightGradPlan&);  // of each branch
  int64_t (*units)(const WinogradWeightGradPlan&);
  size_t (*scratch_bytes)(const WinogradWeightGradPlan&);  // memory that one worker needs, 64-byte aligned
  // Computes the units [begin, end).
  void (*run)(const WinogradWeightGradPlan&, const T* x,  // [M or 1, repeats, groups * C_in, H, W, samples]
              const Prologue<T>& before,                  // of x; none if x is shared
              const T* grad,                              // [M, repeats, groups * C_out, H_out, W_out, samples]
              T* partial,                                 // [parts, M, groups * C_out, C_in, 3, 3]
              void* scratch, int64_t begin, int64_t end);
};

BSFAST_KERNEL(WinogradWeightGrad, winograd_weight_grad)

}  // namespace bsfast
