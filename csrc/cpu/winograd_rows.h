// Staged rows as Winograd's kernels read them: whole vectors of samples, and rows outside the image as zeros.
#pragma once

#include "cpu/ahead.h"
#include "cpu/source_rows.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

// Rows of a whole batch are read in long runs, which pays even where they do not stay in the second-level cache.
constexpr int64_t kRowBytes = 2 * 1024 * 1024;

// Samples taken at a time: whole vectors, and chunks of about one size, if each sample takes `bytes` of rows.
inline int64_t whole_chunk(int64_t samples, int64_t bytes, int64_t lanes) {
  const int64_t fit = kRowBytes / (bytes + 1) / lanes * lanes;
  return round_up(ceil_div(samples, ceil_div(samples, fit < lanes ? lanes : fit)), lanes);
}

inline RowLayout whole_layout(const Axis& rows, const Axis& columns, int64_t channels, int64_t samples, int64_t chunk,
                              int64_t lanes, int64_t size) {
  RowLayout layout(rows, columns, channels, samples, lanes, size);
  layout.chunk = chunk;
  layout.chunks = ceil_div(samples, chunk);
  layout.channel = layout.positions * chunk;
  layout.row = channels * layout.channel;
  return layout;
}

// The rows of a tile: the first channel of each, and the distance between channels.
template <class T, int Count>
struct TileRows {
  const T* row[Count];
  int64_t stride[Count];

  // Rows [first_row, first_row + Count) of an image, as SourceRows::get has them; `zeros` outside.
  void stage(SourceRows<T>& staged, const T* image, int64_t channel, int64_t first_row, int64_t first, const T* zeros) {
    for (int64_t i = 0; i < Count; ++i) {
      const int64_t index = first_row + i;
      const bool inside = index >= 0 && index < staged.rows;
      row[i] = inside ? staged.get(image, channel, index, first) : zeros;
      stride[i] = inside ? staged.layout.channel : 0;
    }
  }
};

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
