// Checks that guard memory, in the form of the Python messages: what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace bsfast {

template <class Sizes>
std::string to_string(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

// Memory order [M][C][H][W][N] of a logical (M, N, C, H, W) or, for a shared input, (N, C, H, W) tensor.
inline void check_batch_last(const torch::stable::Tensor& t, const char* op, const char* name) {
  const int64_t d = t.dim();
  STD_TORCH_CHECK(d == 4 || d == 5, op, ": ", name, " must have 4 or 5 axes, got ", d);
  int64_t expected = t.size(d - 4);
  bool ok = t.size(d - 4) == 1 || t.stride(d - 4) == 1;
  for (int64_t axis : {d - 1, d - 2, d - 3, d - 5}) {
    if (axis < 0) break;
    ok = ok && (t.size(axis) == 1 || t.stride(axis) == expected);
    expected *= t.size(axis);
  }
  STD_TORCH_CHECK(ok || t.numel() == 0, op, ": ", name, " must be batch-last in memory, got strides ",
                  to_string(t.strides()), " for shape ", to_string(t.sizes()));
}

}  // namespace bsfast
