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

  bool uses(int64_t phase) const {
    for (int64_t i = 0; i < columns.first[columns.classes]; ++i)
      if (columns.taps[i].phase == phase) return true;
    return false;
  }

  // Reads the columns that taps use, each once and in their order in memory.
  void stage(const T* in, int64_t channel, int64_t first, T* out) const {
    const int64_t here = samples - first < layout.chunk ? samples - first : layout.chunk, n = layout.chunk;
    const int64_t phases = columns.phases, low = phases * columns.low;  // column of position 0 of phase 0
    const int64_t end = low + phases * layout.positions;
    if (phases == 1 && n == samples) {
      const int64_t begin = low < 0 ? 0 : low, inside = (end < columns.source ? end : columns.source) - begin;
      if (inside > 0) copy(in + begin * n, channel, inside * n, out + (begin - low) * n);
    }
    for (int64_t column = low, phase = 0; column < end; ++column, phase = phase + 1 < phases ? phase + 1 : 0) {
      T* to = out + (phase * layout.positions + (column - low) / phases) * n;
      const bool inside = column >= 0 && column < columns.source;
      if (!inside)
        std::memset(to, 0, size_t(n) * sizeof(T));
      else if (!(phases == 1 && n == samples) && uses(phase)) {
        copy(in + column * samples + first, channel, here, to);
        if (here < n) std::memset(to + here, 0, size_t(n - here) * sizeof(T));
      }
    }
  }
};

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
