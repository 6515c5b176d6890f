// Staged rows as Winograd's kernels read them: whole vectors of samples, rows outside the image as zeros, and the rows
// of the next tiles fetched while those of this one are multiplied.
#pragma once

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

// Source rows that will be staged next, in their order in memory.
template <class T>
struct Ahead {
  int64_t channels, rows, columns, samples;  // of the image
  int64_t chunk;                             // samples that are wanted
  const T* image = nullptr;
  const T* next = nullptr;
  int64_t left = 0;  // elements of this run
  int64_t column = 0, row = 0, begin = 0, end = 0, channel = 0;

  // Wants rows [first_row, first_row + count) of the image at `image`, samples [first, first + chunk).
  void want(const T* of, int64_t first_row, int64_t count, int64_t first) {
    image = of + first;
    begin = first_row < 0 ? 0 : first_row;
    end = first_row + count < rows ? first_row + count : rows;
    channel = column = 0;
    row = begin;
    start();
  }

  // How many lines of the cache are wanted.
  int64_t lines() const { return begin < end ? (end - begin) * channels * columns * chunk / kLine : 0; }

  // Where the next `count` lines are; `other` if there are none left.
  const T* take(int64_t count, const T* other) {
    if (left <= 0) return other;
    const T* at = next;
    next += count * kLine;
    left -= count * kLine;
    if (left <= 0) advance();
    return at;
  }

  void fetch(int64_t count) {
    for (; count > 0 && left > 0; --count) __builtin_prefetch(take(1, nullptr), 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);

  void start() {
    left = row < end ? chunk >= samples ? columns * samples : chunk : 0;
    if (left > 0) next = image + ((channel * rows + row) * columns + column) * samples;
  }
  void advance() {
    column = chunk >= samples ? columns : column + 1;
    if (column >= columns) {
      column = 0;
      if (++row >= end) {
        ++channel;
        row = channel < channels ? begin : end;
      }
    }
    start();
  }
};

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
