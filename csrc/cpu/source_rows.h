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
  // Of what a tap reads of a channel, from its row on.
  int64_t offset(int64_t c, const Tap& column, int64_t low) const {
    return c * channel + (column.phase * positions + column.shift - low) * chunk;
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
      stage(image + index * columns.source * samples, channel, first, row);
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
        store_some(to + i, count - i, value);
    }
  }

  bool uses(int64_t phase) const {
    for (int64_t i = 0; i < columns.first[columns.classes]; ++i)
      if (columns.taps[i].phase == phase) return true;
    return false;
  }

  // Puts zeros around the image and copies what taps use of the columns inside.
  void stage(const T* in, int64_t channel, int64_t first, T* out) const {
    const int64_t n = layout.chunk, phases = columns.phases, plane = rows * columns.source * samples;
    const bool few = phases > 1 && n < Lanes<T>::count, at_once = n == samples && (phases == 1 || few);
    for (int64_t phase = 0; phase < phases; ++phase) {
      if (!uses(phase)) continue;
      const int64_t low = phases * columns.low + phase;  // column of position 0
      const int64_t begin = inside(-low), end = inside(columns.source - low);
      T* line = out + phase * layout.positions * n;
      const T* from = in + (low + begin * phases) * samples + first;
      for (int64_t c = 0; c < channels; ++c, line += layout.channel, from += plane) {
        std::memset(line, 0, size_t(begin * n) * sizeof(T));
        std::memset(line + end * n, 0, size_t((layout.positions - end) * n) * sizeof(T));
        if (!at_once) continue;
        if (few)
          copy_few(from, channel + c, end - begin, line + begin * n);
        else
          copy(from, channel + c, (end - begin) * n, line + begin * n);
      }
    }
    for (int64_t c = 0; c < channels && !at_once; ++c)
      stage_columns(in + c * plane + first, channel + c, samples - first < n ? samples - first : n,
                    out + c * layout.channel);
  }

  // Copies `here` samples of all columns of a channel in their order in memory, each once.
  void stage_columns(const T* in, int64_t channel, int64_t here, T* out) const {
    const int64_t n = layout.chunk, phases = columns.phases, low = phases * columns.low;
    for (int64_t column = low < 0 ? 0 : low; column < columns.source; ++column) {
      const int64_t phase = (column - low) % phases, position = (column - low) / phases;
      if (position >= layout.positions) break;
      if (!uses(phase)) continue;
      T* to = out + (phase * layout.positions + position) * n;
      copy(in + column * samples, channel, here, to);
      if (here < n) std::memset(to + here, 0, size_t(n - here) * sizeof(T));
    }
  }

  // Positions of a phase before the one whose column is `columns_before` after that of position 0.
  int64_t inside(int64_t columns_before) const {
    const int64_t before = columns_before <= 0 ? 0 : ceil_div(columns_before, columns.phases);
    return before < layout.positions ? before : layout.positions;
  }

  // Copies all samples of the columns of one phase, through the prologue.
  void copy_few(const T* from, int64_t channel, int64_t count, T* to) const {
    const int64_t step = columns.phases * samples;
    const T scale = before.scale ? before.scale[channel] : T(1), shift = before.scale ? before.shift[channel] : T(0);
    const bool relu = before.scale && before.relu;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0; i < count; ++i) {
        const T value = from[i * step + n] * scale + shift;
        to[i * samples + n] = relu && value < T(0) ? T(0) : value;
      }
  }
};

}  // namespace
}  // namespace BSFAST_ISA
}  // namespace bsfast
