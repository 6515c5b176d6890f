// Rows of an image that are fetched into the cache while others are computed with.
#pragma once

#include "cpu/lanes.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

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

  // How many to fetch at each of so many turns.
  int64_t lines_a_turn(int64_t turns) const { return turns > 0 ? ceil_div(lines(), turns) : 0; }

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
