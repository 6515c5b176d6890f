// Which kernel instance computes the weight gradient of every sample, and with what grid: host code, without CUDA.
#pragma once

#include <algorithm>

#include "cuda/conv_plan.h"
#include "cuda/conv_sample_grad.cuh"

namespace bsfast::cuda {

// Pointers as in SampleGradArguments.
template <class T>
SampleGradArguments<T> sample_grad_arguments(const ConvShape& s, int64_t seeds, const T* x, const T* grad, T* result) {
  SampleGradArguments<T> a{};
  a.x = x;
  a.grad = grad;
  a.result = result;
  a.rows = range_of(s, 0);
  a.columns = range_of(s, 1);
  a.groups = narrow("groups", s.groups);
  a.in_channels = narrow("channels", s.in_channels);
  a.out_channels = narrow("channels", s.out_channels);
  a.samples = narrow("the number of samples", s.samples);
  a.gradients = narrow("the number of samples and seeds", seeds * s.samples);
  a.shared_input = s.shared_input;
  check_channel(s);
  return a;
}

template <class T, class Launch>
void conv_sample_grad(const ConvShape& s, const SampleGradArguments<T>& a, const Launch& launch) {
  if (s.branches * s.weights() * a.gradients == 0) return;
  // No more threads than there are samples, in whole warps.
  const int lanes = int(kLanes), threads = std::min(kThreads, (a.gradients - 1) / lanes * lanes + lanes);
  const auto start = [&](auto tile) {
    using Tile = decltype(tile);
    const auto tiles = [](int64_t count, int size) { return (count + size - 1) / size; };
    const int64_t blocks = tiles(s.in_channels * s.taps(), Tile::Rows) * tiles(a.out_channels, Tile::Channels) *
                           tiles(a.gradients, threads) * a.groups * s.branches;
    launch(&bsfast::conv_sample_grad<T, Tile>,
           Grid{unsigned(narrow("the grid", blocks)), unsigned(threads), unsigned(Tile::SharedBytes)}, a);
  };
  // Six channels at a time where that leaves fewer idle.
  const bool six = (a.out_channels + 5) / 6 * 6 < (a.out_channels + 7) / 8 * 8;
  six ? start(SampleGradTile<6, 9>{}) : start(SampleGradTile<8, 9>{});
}

}  // namespace bsfast::cuda
