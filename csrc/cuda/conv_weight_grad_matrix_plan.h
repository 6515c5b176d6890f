// When and with what grid a weight gradient runs on the matrix units: host code, without CUDA.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>

#include "cuda/conv_matrix_plan.h"
#include "cuda/conv_weight_grad_matrix.cuh"

namespace bsfast::cuda {

constexpr int kMostTargets = 8;         // of a window, along an axis
constexpr int64_t kWindowCost = 128;    // of its barriers, in rows that could be copied meanwhile
constexpr int kEnoughGradBlocks = 512;  // four, of 48 KiB each, for each of the 132 multiprocessors of sm_90
constexpr int64_t kLeastWindows = 2;    // of a part
constexpr int64_t kLeastCopied = 2;     // by a part, in bytes for each that its sums are written and read again
constexpr int kMostGradChannelTiles = 6;

// Calls use(tile) with the fewest tiles of 8 output channels, of at most six, that hold all channels evenly; six for
// five, too.
template <class T, class Use>
void choose_matrix_grad_tile(const WeightGradArguments<T>& a, Use use) {
  const int eights = (a.out_channels + 7) / 8, rounds = (eights + kMostGradChannelTiles - 1) / kMostGradChannelTiles;
  switch ((eights + rounds - 1) / rounds) {
    case 1:
      return use(MatrixGradTile<1>{});
    case 2:
      return use(MatrixGradTile<2>{});
    case 3:
      return use(MatrixGradTile<3>{});
    case 4:
      return use(MatrixGradTile<4>{});
    default:
      return use(MatrixGradTile<6>{});
  }
}

inline GradWindowAxis grad_window_axis(const Range& range, int targets) {
  const int unit = range.kernel > 1 ? std::gcd(range.stride, range.dilation) : range.stride;
  const int stride = range.stride / unit, dilation = range.kernel > 1 ? range.dilation / unit : 0;
  return {targets, (targets - 1) * stride + (range.kernel - 1) * dilation + 1, unit, stride, dilation};
}

// The window that has the least copied to shared memory, if any fits there.
template <class Tile, class T>
std::optional<GradWindow> choose_grad_window(const WeightGradArguments<T>& a) {
  const auto rounds = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
  const int taps = a.rows.kernel * a.columns.kernel;
  const int64_t all_rows = int64_t(a.in_channels) * taps;
  std::optional<GradWindow> best;
  int64_t least = 0;
  for (int row_warps = 1; row_warps <= kWarps; row_warps *= 2) {
    if (row_warps > 1 && row_warps / 2 * Tile::WarpRows >= all_rows) break;
    // Whole input channels, unless one has too many taps.
    GradWindow window{{}, {}, 0, std::min(Tile::Channels, a.out_channels), 0, row_warps};
    const int most = row_warps * Tile::WarpRows;
    const int64_t blocks = taps <= most ? rounds(a.in_channels, most / taps) : rounds(all_rows, most);
    window.block_rows = int(taps <= most ? rounds(a.in_channels, blocks) * taps : rounds(all_rows, blocks));
    window.input_channels = taps <= most ? window.block_rows / taps : std::min(2, a.in_channels);
    for (int height = 1; height <= std::min(kMostTargets, a.rows.target); ++height)
      for (int width = 1; width <= std::min(kMostTargets, a.columns.target); ++width) {
        window.rows = grad_window_axis(a.rows, height);
        window.columns = grad_window_axis(a.columns, width);
        if (int64_t(window.rows.sources) * window.columns.sources * window.input_channels > kSharedBytes) continue;
        if (window.shared_bytes<Tile>() > kSharedBytes) continue;
        const int64_t copied = window.input_rows() + window.output_rows();
        const int64_t windows = rounds(a.rows.target, height) * rounds(a.columns.target, width);
        const int64_t cost = blocks * windows * (copied + kWindowCost);
        if (best && cost >= least) continue;
        best = window;
        least = cost;
      }
  }
  return best;
}

// Blocks of one part.
template <class Tile, class T>
int64_t matrix_grad_blocks(const MatrixWeightGradArguments<T>& m) {
  const WeightGradArguments<T>& a = m.grad;
  const auto tiles = [](int64_t count, int size) { return (count + size - 1) / size; };
  return int64_t(a.branches) * a.groups * tiles(a.out_channels, Tile::Channels) *
         tiles(int64_t(a.in_channels) * a.rows.kernel * a.columns.kernel, m.window.block_rows);
}

// The same sums on the matrix units of sm_80 and later, in parts of their own, unless the sizes do not fit them.
template <class T>
std::optional<MatrixWeightGradArguments<T>> matrix_arguments(const WeightGradArguments<T>& grad, MatrixUnits units) {
  static_assert(sizeof(T) == 2, "the matrix units take 16-bit storage here");
  if (units != MatrixUnits::sm_80) return std::nullopt;
  MatrixWeightGradArguments<T> m{grad, {}};
  WeightGradArguments<T>& a = m.grad;
  if (a.samples % 8 != 0 || a.samples > kMostSamples || !aligned(16, {a.x, a.grad})) return std::nullopt;
  if (int64_t(a.branches) * a.groups * a.in_channels * a.out_channels == 0) return std::nullopt;
  bool fits = false;
  choose_matrix_grad_tile(a, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t sample_tiles = (a.samples + Tile::Samples - 1) / Tile::Samples;
    if (double(a.samples) < kLeastFilled * double(sample_tiles * Tile::Samples)) return;
    const auto window = choose_grad_window<Tile>(a);
    if (!window) return;
    m.window = *window;
    const auto tiles = [](int64_t count, int size) { return (count + size - 1) / size; };
    const int windows = narrow("the windows", sample_tiles * tiles(a.rows.target, window->rows.targets) *
                                                  tiles(a.columns.target, window->columns.targets));
    const int64_t wanted = tiles(kEnoughGradBlocks, narrow("the grid", matrix_grad_blocks<Tile>(m)));
    const int64_t copied = int64_t(window->input_rows() + window->output_rows()) * Tile::Samples * 2;
    const int64_t summed = int64_t(window->block_rows) * Tile::Channels * 2 * int64_t(sizeof(float));
    const int64_t least = std::max(kLeastWindows, tiles(kLeastCopied * summed, narrow("a window", copied)));
    a.parts = int(std::clamp<int64_t>(windows / least, 1, wanted));
    fits = true;
  });
  return fits ? std::optional(m) : std::nullopt;
}

// Writes the weight gradient, [M, groups * C_out, C_in, kH, kW]; the caller has set `partial`.
template <class T, class Launch>
void conv_weight_grad(const ConvShape& shape, const MatrixWeightGradArguments<T>& m, T* result, const Launch& launch) {
  choose_matrix_grad_tile(m.grad, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t blocks = matrix_grad_blocks<Tile>(m) * m.grad.parts;
    launch(&bsfast::conv_weight_grad_matrix<T, Tile>,
           Grid{unsigned(narrow("the grid", blocks)), unsigned(kThreads),
                unsigned(m.window.template shared_bytes<Tile>())},
           m);
  });
  sum_parts(shape, m.grad, result, launch);
}

}  // namespace bsfast::cuda
