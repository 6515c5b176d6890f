// With what grid the statistics of a convolution's blocks are merged: host code, without CUDA.
#pragma once

#include "cuda/conv_plan.h"
#include "cuda/statistics.cuh"

namespace bsfast::cuda {

template <class Launch>
void merge_statistics(const MergeArguments& a, const Launch& launch) {
  if (a.channels == 0) return;
  const int blocks = narrow("the grid", (a.channels + kWarps - 1) / kWarps);
  launch(&bsfast::merge_statistics, Grid{unsigned(blocks), unsigned(kThreads), 0}, a);
}

}  // namespace bsfast::cuda
