// Convolution and its transpose with samples in the vector lanes (or, on contiguous memory, columns), written over the
// vector width and compiled per instruction set. Positions and samples of a staged row form one long line, and a tile
// of target channels x vectors of that line stays in registers while all taps of all source channels are added up, as
// in a matrix product whose second operand is given by one pointer a row.
#include "cpu/conv_gather.h"

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
  int64_t sources, targets, padded_targets, most_taps;

  explicit Work(const GatherPlan& plan)
      : plan(plan),
        layout(plan.rows, plan.columns, plan.source_channels(), plan.shape.samples, Lanes<T>::count, sizeof(T)),
        tile(tile_channels(plan.target_channels())),
        sources(plan.source_channels()),
        targets(plan.target_channels()),
        padded_targets(round_up(targets, tile)),
        most_taps(sources * plan.shape.taps()) {}

  int64_t images() const { return plan.shape.branches * plan.shape.repeats; }
  int64_t slices() const { return layout.chunks * plan.rows.target; }
  int64_t units() const { return images() * plan.shape.groups * slices(); }
  int64_t sums() const { return round_up(targets * TargetRow<T>::kSums, 64); }
  int64_t weights() const { return round_up(padded_targets * sources * plan.shape.taps(), 64); }
  int64_t row_elements() const { return round_up(layout.elements(kAccumulators * Lanes<T>::count), 64); }
  size_t bytes() const {
    return size_t(weights() + row_elements() + sums()) * sizeof(T) + size_t(most_taps + layout.slots + 64) * 8;
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
    for (int64_t rw = 0; rw < plan.columns.classes; ++rw)
      for (int64_t first = 0; first < work.targets; first += work.tile)
        for (int64_t i = plan.rows.first[rh]; i < plan.rows.first[rh + 1]; ++i)
          for (int64_t c = 0; c < work.sources; ++c)
            for (int64_t j = plan.columns.first[rw]; j < plan.columns.first[rw + 1]; ++j)
              for (int64_t t = first; t < first + work.tile; ++t)
                *packed++ = t < work.targets
                                ? weight[t * target_stride + c * source_stride +
                                         plan.rows.taps[i].kernel * s.kernel[1] + plan.columns.taps[j].kernel]
                                : T(0);
}

// One register tile: `Channels` targets of `Vectors` vectors of the line, over `count` source lines.
template <class T, int Channels, int Vectors>
inline __attribute__((always_inline)) void tile(const T* const* lines, int64_t count, const T* packed, int64_t first,
                                                int64_t at, int64_t channels, const TargetRow<T>& target) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count;
  V sum[Channels][Vectors] = {};
  for (int64_t k = 0; k < count; ++k, packed += Channels) {
    const T* line = lines[k] + at;
    V in[Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) in[i] = load(line + i * L);
#pragma GCC unroll 8
    for (int o = 0; o < Channels; ++o) {
      const T w = packed[o];
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) sum[o][i] += in[i] * w;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Channels; ++o) {
    if (first + o >= channels) break;
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) target.put(first + o, at + i * L, sum[o][i]);
  }
}

// All channels of one target line.
template <class T, int Channels>
void line(const Work<T>& work, const T* const* lines, int64_t count, const T* packed, int64_t tile_weights,
          const TargetRow<T>& target) {
  constexpr int64_t L = Lanes<T>::count;
  constexpr int Vectors = kAccumulators / Channels;
  int64_t at = 0;
  for (; at < target.length; at += at + Vectors * L <= target.length ? Vectors * L : L) {
    const bool whole = at + Vectors * L <= target.length;
    const T* weights = packed;
    for (int64_t o = 0; o < work.targets; o += Channels, weights += tile_weights)
      if (whole)
        tile<T, Channels, Vectors>(lines, count, weights, o, at, work.targets, target);
      else
        tile<T, Channels, 1>(lines, count, weights, o, at, work.targets, target);
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
  const T** lines = reinterpret_cast<const T**>(sums + work.sums());
  SourceRows<T> staged{columns,   layout,          work.sources, rows.source,
                       s.samples, operands.before, memory,       reinterpret_cast<int64_t*>(lines + work.most_taps)};
  const int64_t source_image = work.sources * rows.source * columns.source * s.samples;
  const int64_t target_plane = rows.target * columns.target * s.samples;
  const Epilogue<T>& after = operands.after;
  const bool aligned = reinterpret_cast<uintptr_t>(operands.target) % kVectorBytes == 0 && s.samples % L == 0;
  const bool large = work.images() * s.groups * work.targets * target_plane * int64_t(sizeof(T)) > kStreamBytes;
  const bool shared_source = s.shared_input && !plan.transposed;
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
    const int64_t rh = h % rows.classes, row_taps = rows.first[rh + 1] - rows.first[rh];
    const T* weights = packed + rows.first[rh] * s.kernel[1] * work.sources * work.padded_targets;
    for (int64_t rw = 0; rw < columns.classes; ++rw) {
      const int64_t column_taps = columns.first[rw + 1] - columns.first[rw];
      const int64_t tap_weights = work.sources * column_taps * work.tile;
      // Rows outside the image add nothing: they are the first or the last of the taps.
      int64_t count = 0, skipped = 0;
      for (int64_t i = rows.first[rh]; i < rows.first[rh + 1]; ++i) {
        const Tap& tap = rows.taps[i];
        const int64_t index = (h / rows.classes + tap.shift) * rows.phases + tap.phase;
        if (index < 0 || index >= rows.source) {
          if (count == 0) ++skipped;
          continue;
        }
        const T* row = staged.get(in, (branch * s.groups + group) * work.sources, index, first);
        for (int64_t c = 0; c < work.sources; ++c)
          for (int64_t j = columns.first[rw]; j < columns.first[rw + 1]; ++j)
            lines[count++] =
                row + c * layout.channel +
                (columns.taps[j].phase * layout.positions + columns.taps[j].shift - columns.low) * layout.chunk;
      }
      const int64_t pixel = columns.classes * s.samples;
      const bool dense = columns.classes == 1 && layout.chunk == s.samples;
      const int64_t at = out + rw * s.samples;
      const TargetRow<T> to{operands.target + at,
                            after.residual ? after.residual + at : nullptr,
                            after.mask ? after.mask + at : nullptr,
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
      const T* own = weights + skipped * tap_weights;
      const int64_t tile_weights = row_taps * tap_weights;
      if (work.tile == 8)
        line<T, kAccumulators % 8 == 0 ? 8 : 4>(work, lines, count, own, tile_weights, to);
      else if (work.tile == 6)
        line<T, 6>(work, lines, count, own, tile_weights, to);
      else
        line<T, 4>(work, lines, count, own, tile_weights, to);
      if (after.moments)  // of a convolution, which has one column class
        for (int64_t o = 0; o < work.targets; ++o) after.moments[unit * work.targets + o] = to.moments(o);
      weights += row_taps * column_taps * work.sources * work.padded_targets;
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
