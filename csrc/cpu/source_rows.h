// Source rows that a worker keeps in scratch, padded with zeros and split by phase, so that every tap of a target row
// is a vector at a fixed distance: position (q, n) of tap t is element offset(t) + q * samples + n.
#pragma once

#include "cpu/around.h"
#include "cpu/axis.h"
#include "cpu/lanes.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

constexpr int64_t kScratchBytes = 768 * 1024;  // of a 1 MiB second-level cache

// Sizes of the rows in scratch, in elements.
struct RowLayout {
  int64_t positions;  // of one phase, with padding
  int64_t chunk;      // samples taken at a time
  int64_t chunks;
  int64_t channel, row;  // strides; a row holds all channels
  int64_t slots;         // rows kept at a time

  RowLayout(const Axis& rows, const Axis& columns, int64_t channels, int64_t samples, int64_t lanes, int64_t size) {
    positions = columns.targets(0) + columns.high - columns.low;
    slots = (rows.high - rows.low + 1) * rows.phases;
    const int64_t bytes = slots * channels * columns.phases * positions * size;  // for each sample
    const int64_t fit = kScratchBytes / (bytes + 1) / lanes * lanes;
    // Whole vectors, and chunks of about one size.
    chunks = samples <= fit ? 1 : ceil_div(samples, fit < lanes ? lanes : fit);
    chunk = chunks == 1 ? samples : round_up(ceil_div(samples, chunks), lanes);
    chunks = ceil_div(samples, chunk);
    channel = round_up(columns.phases * positions * chunk, lanes);
    row = channels * channel;
  }
  int64_t elements(int64_t slack) const { return slots * row + slack; }  // loads may pass the end by the slack
};

// Where row `index` of an image is: a ring that holds the latest rows asked for.
template <class T>
struct SourceRows {
  const Axis& columns;
  const RowLayout& layout;
  int64_t channels, rows, samples;  // of the image
  Prologue<T> before;
  T* memory;
  int64_t* held;  // index of the row in each slot

  void forget() {
    for (int64_t i = 0; i < layout.slots; ++i) held[i] = -1;
  }

  // Row `index` of channels [0, channels) of the image at `image`, samples [first, first + chunk); its first channel is
  // the prologue's `channel`.
  const T* get(const T* image, int64_t channel, int64_t index, int64_t first) {
    const int64_t slot = index % layout.slots;
    T* row = memory + slot * layout.row;
    if (held[slot] != index) {
      held[slot] = index;
      for (int64_t c = 0; c < channels; ++c)
        stage(image + (c * rows + index) * columns.source * samples, channel + c, first, row + c * layout.channel);
    }
    return row;
  }

 private:
  bool uses(int64_t phase) const {
    for (int64_t i = 0; i < columns.first[columns.classes]; ++i)
      if (columns.taps[i].phase == phase) return true;
    return false;
  }

  // Copies some elements of a channel through the prologue.
  void copy(const T* from, int64_t channel, int64_t count, T* to) const {
    if (before.scale == nullptr) {
      std::memcpy(to, from, size_t(count) * sizeof(T));
      return;
    }
    constexpr int64_t L = Lanes<T>::count;
    const T scale = before.scale[channel], shift = before.shift[channel];
    for (int64_t i = 0; i < count; i += L) {
      const bool whole = i + L <= count;
      auto value = (whole ? load(from + i) : load_some(from + i, count - i)) * scale + shift;
      if (before.relu) value = rectified<T>(value);
      if (whole)
        store(to + i, value);
      else
        std::memcpy(to + i, &value, size_t(count - i) * sizeof(T));
    }
  }

  void stage(const T* in, int64_t channel, int64_t first, T* out) const {
    const int64_t here = samples - first < layout.chunk ? samples - first : layout.chunk, n = layout.chunk;
    for (int64_t phase = 0; phase < columns.phases; ++phase, out += layout.positions * n) {
      if (!uses(phase)) continue;
      // Positions [begin, end) are inside the image: 0 <= phases * (position + low) + phase < source.
      const int64_t begin = columns.low < 0 ? -columns.low : 0;
      int64_t end = ceil_div(columns.source - phase, columns.phases) - columns.low;
      if (end > layout.positions) end = layout.positions;
      if (end < begin) end = begin < layout.positions ? begin : layout.positions;
      const int64_t inside = begin < layout.positions ? begin : layout.positions;
      std::memset(out, 0, size_t(inside * n) * sizeof(T));
      std::memset(out + end * n, 0, size_t((layout.positions - end) * n) * sizeof(T));
      if (end <= inside) continue;
      const T* from = in + (columns.phases * (inside + columns.low) + phase) * samples + first;
      if (columns.phases == 1 && n == samples) {
        copy(from, channel, (end - inside) * n, out + inside * n);
        continue;
      }
      for (int64_t p = inside; p < end; ++p, from += columns.phases * samples) {
        copy(from, channel, here, out + p * n);
        if (here < n) std::memset(out + p * n + here, 0, size_t(n - here) * sizeof(T));
      }
    }
  }
};

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
