// When and with what grid a convolution or its input gradient runs on the matrix units: host code, without CUDA.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "cuda/conv_gather_matrix.cuh"
#include "cuda/conv_plan.h"

namespace bsfast::cuda {

constexpr int kMostChunk = 12;           // channels in shared memory at a time
constexpr int kSharedBytes = 48 * 1024;  // that every launch may ask for
constexpr double kLeastFilled = 0.75;    // of the blocks' samples; below, the ordinary units do less in vain
constexpr int kMostChannelTiles = 3;
constexpr int kMostSamples = 1 << 30;  // beyond, those of the last tile would not fit 32 bits

enum class MatrixUnits { none, sm_70, sm_80 };

// Those that a device can use if it runs code that was compiled for one of these architectures, all as
// 10 * (10 * major + minor). Devices after sm_70 must not run its instructions, which they do far too slowly.
inline MatrixUnits matrix_units_of(int device, std::initializer_list<int> compiled) {
  for (int architecture : compiled) {
    if (architecture == 700 && device == 700) return MatrixUnits::sm_70;
    if (architecture >= 800 && architecture <= device) return MatrixUnits::sm_80;
  }
  return MatrixUnits::none;
}

// Calls use(tile) with the fewest tiles of 8 target channels, of at most three, that hold all channels evenly.
template <class Units, class T, class Use>
void choose_matrix_tile(const GatherArguments<T>& a, Use use) {
  const int eights = (a.targets + 7) / 8, rounds = (eights + kMostChannelTiles - 1) / kMostChannelTiles;
  const int tiles = (eights + rounds - 1) / rounds;
  if (tiles == 1) return use(MatrixTile<1, Units>{});
  return tiles == 2 ? use(MatrixTile<2, Units>{}) : use(MatrixTile<3, Units>{});
}

// The same sums on matrix units, unless these do not take the type or the sizes do not fit them.
template <class T>
std::optional<MatrixGatherArguments<T>> matrix_arguments(const GatherArguments<T>& gather, MatrixUnits units) {
  static_assert(sizeof(T) == 2, "the matrix units take 16-bit storage here");
  if (units == MatrixUnits::none || (units == MatrixUnits::sm_70 && !std::is_same_v<T, Half>)) return std::nullopt;
  MatrixGatherArguments<T> m{gather, {}};
  GatherArguments<T>& a = m.gather;
  if (a.samples % 8 != 0 || a.samples > kMostSamples || !aligned(16, a)) return std::nullopt;
  if (a.targets == 0 || a.sources == 0) return std::nullopt;
  std::optional<MatrixGatherArguments<T>> result;
  choose_matrix_tile<Sm80>(a, [&](auto tile) {  // whose sizes are those of Sm70, too
    using Tile = decltype(tile);
    const int64_t sample_tiles = (a.samples + Tile::Samples - 1) / Tile::Samples;
    if (double(a.samples) < kLeastFilled * double(sample_tiles * Tile::Samples)) return;
    // The largest window and number of taps of any class.
    const auto extent = [](const Axis& axis, int size, int64_t& taps) {
      int64_t span = 0;
      for (int residue = 0; residue < axis.classes(); ++residue) {
        const Taps t = taps_of(axis, residue);
        taps = std::max<int64_t>(taps, t.count);
        if (t.count > 0) span = std::max<int64_t>(span, int64_t(t.count - 1) * t.offset_step);
      }
      return int64_t(size - 1) * axis.step() + span + 1;
    };
    int64_t row_taps = 0, column_taps = 0;
    const int64_t height = extent(a.rows, Tile::Height, row_taps), width = extent(a.columns, Tile::Width, column_taps);
    if (height * width * Tile::Samples * 2 > kSharedBytes || row_taps * column_taps > kSharedBytes) return;
    const auto with_chunk = [&](int chunk) {
      const int pairs = chunk * int(row_taps * column_taps);
      const int depth = (pairs + Tile::DepthUnit - 1) / Tile::DepthUnit * Tile::DepthUnit;
      return MatrixWindow{int(height), int(width), chunk, depth};
    };
    int most = std::min(kMostChunk, a.sources);
    while (most > 0 && with_chunk(most).template shared_bytes<Tile>() > kSharedBytes) --most;
    if (most == 0) return;
    const int rounds = (a.sources + most - 1) / most;
    m.window = with_chunk((a.sources + rounds - 1) / rounds);
    const auto tiles = [](const Axis& axis, int size) { return (int64_t(axis.targets(0)) + size - 1) / size; };
    a.parts = narrow("the grid", tiles(a.rows, Tile::Height) * tiles(a.columns, Tile::Width) * sample_tiles);
    result = m;
  });
  return result;
}

template <class T, class Launch>
void conv_gather_matrix(const ConvShape& shape, const MatrixGatherArguments<T>& m, MatrixUnits units,
                        const Launch& launch) {
  const auto start = [&](auto tile) {
    using Tile = decltype(tile);
    const unsigned blocks = gather_blocks<T, Tile>(shape, m.gather);
    if (blocks == 0) return;
    launch(&bsfast::conv_gather_matrix<T, Tile>,
           Grid{blocks, unsigned(kThreads), unsigned(m.window.template shared_bytes<Tile>())}, m);
  };
  if constexpr (std::is_same_v<T, Half>)
    if (units == MatrixUnits::sm_70) return choose_matrix_tile<Sm70>(m.gather, start);
  choose_matrix_tile<Sm80>(m.gather, start);
}

}  // namespace bsfast::cuda
