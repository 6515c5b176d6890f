// Convolution and its input gradient of M branches by Winograd's minimal filtering, one version per instruction set:
// kernels of 3x3 taps with stride and dilation 1, on batch-last memory.
#pragma once

#include <cstddef>

#include "cpu/axis.h"
#include "cpu/conv_gather.h"
#include "isa.h"
#include "shape.h"

namespace bsfast {

// Whether Winograd's kernels can compute a convolution of this shape and its gradients, with samples in most lanes.
inline bool winograd_supports(const ConvShape& s) {
  for (int i = 0; i < 2; ++i)
    if (s.kernel[i] != 3 || s.stride[i] != 1 || s.dilation[i] != 1 || s.padding[i] > 2) return false;
  return s.repeats == 1;
}

// The input gradient is the convolution of the output's gradient with the transposed, flipped weights. Rows of tiles of
// all images, in the order (branch, repeat, group, chunk of samples, row), are the units of parallel work.
struct WinogradPlan {
  ConvShape shape;
  bool transposed;
  int tile;            // outputs of a tile along each axis: 2 or 4
  Axis rows, columns;  // whole tiles; a tile is taken as one target whose taps are all rows it reads

  WinogradPlan(const ConvShape& shape, bool transposed, int tile)
      : shape(shape),
        transposed(transposed),
        tile(tile),
        rows(axis(shape, transposed, tile, 0, tile + 2)),
        columns(axis(shape, transposed, tile, 1, 3)) {}

  int64_t source_channels() const { return transposed ? shape.out_channels : shape.in_channels; }
  int64_t target_channels() const { return transposed ? shape.in_channels : shape.out_channels; }
  int64_t target_size(int i) const { return transposed ? shape.size[i] : shape.out_size(i); }

 private:
  static Axis axis(const ConvShape& s, bool transposed, int64_t tile, int i, int64_t taps) {
    const int64_t in = s.size[i], out = s.out_size(i), target = transposed ? in : out;
    return {transposed ? out : in,
            (target + tile - 1) / tile * tile,
            taps,
            1,
            transposed ? 2 - s.padding[i] : s.padding[i],
            1,
            false};
  }
};

template <class T>
struct Winograd {
  int64_t (*units)(const WinogradPlan&);         // how many units of work there are
  int64_t (*slices)(const WinogradPlan&);        // units of an image's group; of the moments
  size_t (*scratch_bytes)(const WinogradPlan&);  // memory that one worker needs, 64-byte aligned
  // Computes the units [begin, end); the weights are [M, groups * C_out, C_in, 3, 3].
  void (*run)(const WinogradPlan&, const GatherOperands<T>&, void* scratch, int64_t begin, int64_t end);
};

BSFAST_KERNEL(Winograd, winograd)

}  // namespace bsfast
