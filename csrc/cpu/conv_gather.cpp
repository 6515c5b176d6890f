// Convolution and its transpose with samples in the vector lanes (or, on contiguous memory, columns), written over the
// vector width and compiled per instruction set. Positions and samples of a staged row form one long line, and a tile
// of target channels x vectors of that line stays in registers while all taps of all source channels are added up, as
// in a matrix product whose second operand is given by one pointer a row.
#include "cpu/conv_gather.h"

#include "cpu/ahead.h"
#include "cpu/source_rows.h"
#include "cpu/target_row.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

// Target channels of a tile: the number that leaves the fewest idle.
inline int tile_channels(int64_t channels) {
  int best = 4;
  for (int size : {6, 8})
    if (kAccumulators % size == 0 && round_up(channels, size) <= round_up(channels, best)) best = size;
  return best;
}

// Sizes that one worker needs, for one plan.
template <class T>
struct Work {
  const GatherPlan& plan;
  RowLayout layout;
  int tile;
  int64_t sources, targets, padded_targets;

  explicit Work(const GatherPlan& plan)
      : plan(plan),
        layout(plan.rows, plan.columns, plan.source_channels(), plan.shape.samples, Lanes<T>::count, sizeof(T)),
        tile(tile_channels(plan.target_channels())),
        sources(plan.source_channels()),
        targets(plan.target_channels()),
        padded_targets(round_up(targets, tile)) {}

  int64_t images() const { return plan.shape.branches * plan.shape.repeats; }
  int64_t slices() const { return layout.chunks * plan.rows.target; }
  int64_t units() const { return images() * plan.shape.groups * slices(); }
  int64_t sums() const { return round_up(targets * TargetRow<T>::kSums, 64); }
  int64_t weights() const { return round_up(padded_targets * sources * plan.shape.taps(), 64); }
  int64_t offsets() const { return sources * plan.shape.kernel[1]; }
  int64_t row_elements() const { return round_up(layout.elements(kAccumulators * Lanes<T>::count), 64); }
  size_t bytes() const {
    return size_t(weights() + row_elements() + sums()) * sizeof(T) +
           size_t(offsets() + plan.shape.kernel[0] + layout.slots + 64) * 8;
  }
};

// Packs the weights of one group as [row class][column class][tile of channels][row tap][source][column tap][channel];
// missing channels are zero.
template <class T>
void pack_weights(const Work<T>& work, const T* weight, T* packed) {
  const GatherPlan& plan = work.plan;
  const ConvShape& s = plan.shape;
  const int64_t taps = s.taps(), per_out = s.in_channels * taps;
  const int64_t source_stride = plan.transposed ? per_out : taps, target_stride = plan.transposed ? taps : per_out;
  for (int64_t rh = 0; rh < plan.rows.classes; ++rh)
    for (int64_t rw = 0; rw < plan.columns.classes; ++rw) {
      const Tap *row = plan.rows.taps + plan.rows.first[rh], *column = plan.columns.taps + plan.columns.first[rw];
      const int64_t height = plan.rows.count(rh), width = plan.columns.count(rw);
      for (int64_t t = 0; t < work.padded_targets; ++t) {
        T* to = packed + t / work.tile * work.tile * height * work.sources * width + t % work.tile;
        for (int64_t i = 0; i < height; ++i)
          for (int64_t c = 0; c < work.sources; ++c) {
            const T* from = weight + t * target_stride + c * source_stride + row[i].kernel * s.kernel[1];
            for (int64_t j = 0; j < width; ++j, to += work.tile) *to = t < work.targets ? from[column[j].kernel] : T(0);
          }
      }
      packed += work.padded_targets * height * work.sources * width;
    }
}

// The source of one target line: `count` rows, of each the lines at the same offsets.
template <class T>
struct Lines {
  const T* const* rows;
  int64_t count;
  const int64_t* offsets;
  int64_t per_row;
};

// One register tile: `Channels` targets of `Vectors` vectors of the line.
template <class T, int Channels, int Vectors>
inline __attribute__((always_inline)) void tile(const Lines<T>& lines, const T* packed, int64_t first, int64_t at,
                                                int64_t channels, const TargetRow<T>& target) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count;
  V sum[Channels][Vectors] = {};
  for (int64_t i = 0; i < lines.count; ++i) {
    const T* row = lines.rows[i] + at;
    for (int64_t k = 0; k < lines.per_row; ++k, packed += Channels) {
      const T* line = row + lines.offsets[k];
      V in[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) in[v] = load(line + v * L);
#pragma GCC unroll 8
      for (int o = 0; o < Channels; ++o) {
        const T w = packed[o];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[o][v] += in[v] * w;
      }
    }
  }
  if (target.takes_whole(at, Vectors)) {
#pragma GCC unroll 8
    for (int o = 0; o < Channels; ++o) {
      if (first + o >= channels) break;
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) target.put_whole(first + o, at + v * L, sum[o][v]);
    }
    return;
  }
  if constexpr (Vectors == 1)
    if (target.dense) {
      for (int o = 0; o < Channels && first + o < channels; ++o) target.put_last(first + o, at, sum[o][0]);
      return;
    }
  T values[Channels][Vectors * L];
#pragma GCC unroll 8
  for (int o = 0; o < Channels; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(values[o] + v * L, sum[o][v]);
  for (int o = 0; o < Channels && first + o < channels; ++o) target.put_some(first + o, at, values[o], Vectors * L);
}

// All channels of one target line. Fetches some of the rows ahead after each tile.
template <class T, int Channels>
void line(const Work<T>& work, const Lines<T>& lines, const T* packed, int64_t tile_weights, const TargetRow<T>& target,
          Ahead<T>& ahead, int64_t ahead_lines) {
  constexpr int64_t L = Lanes<T>::count;
  constexpr int Vectors = kAccumulators / Channels;
  for (int64_t at = 0, taken; at < target.length; at += taken) {
    const int64_t left = target.length - at;
    taken = left >= Vectors * L ? Vectors * L : left >= 2 * L ? 2 * L : L;
    const T* weights = packed;
    for (int64_t o = 0; o < work.targets; o += Channels, weights += tile_weights) {
      if (taken == Vectors * L)
        tile<T, Channels, Vectors>(lines, weights, o, at, work.targets, target);
      else if (taken == 2 * L)
        tile<T, Channels, 2>(lines, weights, o, at, work.targets, target);
      else
        tile<T, Channels, 1>(lines, weights, o, at, work.targets, target);
      ahead.fetch(ahead_lines);
    }
  }
}

template <class T>
int64_t units(const GatherPlan& plan) {
  return Work<T>(plan).units();
}

template <class T>
int64_t slices(const GatherPlan& plan) {
  return Work<T>(plan).slices();
}

template <class T>
size_t scratch_bytes(const GatherPlan& plan) {
  return Work<T>(plan).bytes();
}

template <class T>
void run(const GatherPlan& plan, const GatherOperands<T>& operands, void* scratch, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<T>::count;
  const Work<T> work(plan);
  const ConvShape& s = plan.shape;
  const RowLayout& layout = work.layout;
  const Axis &rows = plan.rows, &columns = plan.columns;
  T* packed = static_cast<T*>(scratch);
  T* memory = packed + work.weights();
  T* sums = memory + work.row_elements();
  const T** source_rows = reinterpret_cast<const T**>(sums + work.sums());
  int64_t* offsets = reinterpret_cast<int64_t*>(source_rows + s.kernel[0]);  // [column class][source][column tap]
  SourceRows<T> staged{columns,   layout,          work.sources, rows.source,
                       s.samples, operands.before, memory,       offsets + work.offsets()};
  for (int64_t rw = 0, i = 0; rw < columns.classes; ++rw)
    for (int64_t c = 0; c < work.sources; ++c)
      for (int64_t j = columns.first[rw]; j < columns.first[rw + 1]; ++j)
        offsets[i++] = layout.offset(c, columns.taps[j], columns.low);
  const int64_t source_image = work.sources * rows.source * columns.source * s.samples;
  const int64_t target_plane = rows.target * columns.target * s.samples;
  const Epilogue<T>& after = operands.after;
  const bool aligned = reinterpret_cast<uintptr_t>(operands.target) % kVectorBytes == 0 && s.samples % L == 0;
  const bool large = work.images() * s.groups * work.targets * target_plane * int64_t(sizeof(T)) > kStreamBytes;
  const bool shared_source = s.shared_input && !plan.transposed;
  const int64_t vectors = columns.classes * ceil_div(columns.targets(0) * layout.chunk, L) * rows.classes;
  const int64_t tiles_of_row = ceil_div(vectors * work.tile, kAccumulators) * ceil_div(work.targets, work.tile);
  Ahead<T> ahead{work.sources, rows.source, columns.source, s.samples, layout.chunk};
  int64_t image_before = -1, group_before = -1;  // whose rows are staged; whose weights are packed
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t h = unit % rows.target, chunk = unit / rows.target % layout.chunks;
    const int64_t group = unit / rows.target / layout.chunks % s.groups;
    const int64_t image = unit / rows.target / layout.chunks / s.groups, branch = image / s.repeats;
    if (branch * s.groups + group != group_before) {
      group_before = branch * s.groups + group;
      pack_weights(work, operands.weight + group_before * s.out_channels * s.in_channels * s.taps(), packed);
    }
    if (unit / rows.target != image_before) {
      image_before = unit / rows.target;
      staged.forget();
    }
    const int64_t first = chunk * layout.chunk, source_index = shared_source ? image % s.repeats : image;
    const T* in = operands.source + (source_index * s.groups + group) * source_image;
    const int64_t out =
        (image * s.groups + group) * work.targets * target_plane + h * columns.target * s.samples + first;
    const int64_t channel = (branch * s.groups + group) * work.targets;  // of the epilogue
    // Rows outside the image add nothing: they are the first or the last of the taps.
    const int64_t rh = h % rows.classes;
    int64_t count = 0, skipped = 0;
    for (int64_t i = rows.first[rh]; i < rows.first[rh + 1]; ++i) {
      const Tap& tap = rows.taps[i];
      const int64_t index = (h / rows.classes + tap.shift) * rows.phases + tap.phase;
      if (index >= 0 && index < rows.source)
        source_rows[count++] = staged.get(in, (branch * s.groups + group) * work.sources, index, first);
      else if (count == 0)
        ++skipped;
    }
    if (h % rows.classes == 0) ahead.want(in, (h / rows.classes + 1 + rows.high) * rows.phases, rows.phases, first);
    const int64_t ahead_lines = ahead.lines_a_turn(tiles_of_row);
    const T* weights = packed + rows.first[rh] * s.kernel[1] * work.sources * work.padded_targets;
    for (int64_t rw = 0; rw < columns.classes; ++rw) {
      const int64_t per_row = work.sources * columns.count(rw);
      const Lines<T> lines{source_rows, count, offsets + columns.first[rw] * work.sources, per_row};
      const int64_t pixel = columns.classes * s.samples;
      const bool dense = columns.classes == 1 && layout.chunk == s.samples;
      const int64_t at = out + rw * s.samples;
      const TargetRow<T> to{operands.target + at,
                            after.residual ? after.residual + at : nullptr,
                            after.mask ? after.mask + at : nullptr,
                            after.scale ? after.scale + channel : nullptr,
                            after.bias ? after.bias + channel : nullptr,
                            after.moments ? sums : nullptr,
                            after.relu,
                            target_plane,
                            pixel,
                            layout.chunk,
                            s.samples - first < layout.chunk ? s.samples - first : layout.chunk,
                            columns.targets(rw) * layout.chunk,
                            dense,
                            large && aligned && s.samples % layout.chunk == 0 && layout.chunk % L == 0};
      const T* own = weights + skipped * per_row * work.tile;
      const int64_t tile_weights = rows.count(rh) * per_row * work.tile;
      if (work.tile == 8)
        line<T, kAccumulators % 8 == 0 ? 8 : 4>(work, lines, own, tile_weights, to, ahead, ahead_lines);
      else if (work.tile == 6)
        line<T, 6>(work, lines, own, tile_weights, to, ahead, ahead_lines);
      else
        line<T, 4>(work, lines, own, tile_weights, to, ahead, ahead_lines);
      if (after.moments)  // of a convolution, which has one column class
        for (int64_t o = 0; o < work.targets; ++o) after.moments[unit * work.targets + o] = to.moments(o);
      weights += rows.count(rh) * per_row * work.padded_targets;
    }
  }
  stream_fence();
}

}  // namespace

template <class T>
Gather<T> gather() {
  return {units<T>, slices<T>, scratch_bytes<T>, run<T>};
}
template Gather<float> gather<float>();
template Gather<double> gather<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
