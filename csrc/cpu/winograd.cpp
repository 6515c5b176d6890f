// Winograd's minimal filtering with samples in the vector lanes: all transforms are sums of whole vectors, and for each
// frequency what is left is a matrix product over channels. A few vectors of a row of tiles and one row of frequencies
// are taken at a time, so that transformed inputs stay in the first-level cache, and the products of a row of
// frequencies in registers until they are transformed along that row.
#include "cpu/winograd.h"

#include "cpu/source_rows.h"
#include "cpu/target_row.h"
#include "cpu/winograd_rows.h"
#include "cpu/winograd_transforms.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

// A register tile holds all frequencies of a row, for some targets and vectors.
template <int Tile>
struct Registers {
  static constexpr int per_frequency = kAccumulators / (Tile + 2);
  static constexpr int channels = per_frequency >= 4 ? 2 : 1;
  static constexpr int vectors = per_frequency / channels;
};

// Sizes that one worker needs, for one plan.
template <class T, int Tile>
struct Work {
  static constexpr int64_t L = Lanes<T>::count, kAxis = Tile + 2, kVectors = Registers<Tile>::vectors;
  const WinogradPlan& plan;
  int64_t sources, targets, padded_targets;
  RowLayout layout;

  explicit Work(const WinogradPlan& plan)
      : plan(plan),
        sources(plan.source_channels()),
        targets(plan.target_channels()),
        padded_targets(round_up(targets, Registers<Tile>::channels)),
        layout(whole_layout(plan.rows, plan.columns, sources, plan.shape.samples, chunk(), L, sizeof(T))) {}

  int64_t chunk() const {
    const int64_t bytes = kAxis * sources * (plan.columns.target + 2) * int64_t(sizeof(T));
    return whole_chunk(plan.shape.samples, bytes, L);
  }
  int64_t images() const { return plan.shape.branches * plan.shape.repeats; }
  int64_t tile_rows() const { return plan.rows.target / Tile; }
  int64_t tiles() const { return plan.columns.target / Tile; }  // of a row
  int64_t line() const { return tiles() * layout.chunk / L; }   // vectors of a row of tiles
  int64_t slices() const { return layout.chunks * tile_rows(); }
  int64_t units() const { return images() * plan.shape.groups * slices(); }
  int64_t sums() const { return round_up(targets * TargetRow<T>::kSums, 64); }
  int64_t weights() const { return round_up(kAxis * kAxis * padded_targets * sources, 64); }
  int64_t row_elements() const { return round_up(layout.elements(0), 64); }
  int64_t panel() const { return sources * kAxis * kVectors * L; }  // of one row of frequencies
  int64_t products() const { return padded_targets * Tile * kVectors * L; }
  size_t bytes() const {
    return size_t(weights() + sums() + row_elements() + layout.channel + panel() + kAxis * products()) * sizeof(T) +
           size_t(layout.slots) * 8;
  }
};

// Transforms the weights of one group, to [row][register tile][source][frequency][target]; missing targets are zero.
template <class T, int Tile>
void pack_weights(const Work<T, Tile>& work, const T* weight, T* packed) {
  constexpr int64_t kAxis = Tile + 2, kAtOnce = 8, kChannels = Registers<Tile>::channels;
  typedef T Targets __attribute__((vector_size(kAtOnce * sizeof(T))));
  const bool transposed = work.plan.transposed;
  const int64_t per_out = work.plan.shape.in_channels * 9;
  const int64_t source_stride = transposed ? per_out : 9, target_stride = transposed ? 9 : per_out;
  for (int64_t first = 0; first < work.targets; first += kAtOnce)
    for (int64_t c = 0; c < work.sources; ++c) {
      Targets taps[3][3] = {}, mapped[kAxis][kAxis];
      for (int64_t t = 0; t < kAtOnce && first + t < work.targets; ++t) {
        const T* from = weight + (first + t) * target_stride + c * source_stride;
        for (int64_t k = 0; k < 9; ++k) taps[k / 3][k % 3][t] = from[transposed ? 8 - k : k];
      }
      both_axes<KernelTransform<Tile>>(taps, mapped);
      for (int64_t i = 0; i < kAxis; ++i)
        for (int64_t t = 0; t < kAtOnce && first + t < work.padded_targets; t += kChannels) {
          T* to = packed + ((i * work.padded_targets + first + t) * work.sources + c * kChannels) * kAxis;
          for (int64_t j = 0; j < kAxis; ++j)
            for (int64_t o = 0; o < kChannels; ++o) *to++ = mapped[i][j][t + o];
        }
    }
}

// Some vectors of a row of tiles, which go in the order (vector of samples, tile): neighbours share inputs.
template <int Vectors>
struct Segment {
  int64_t count;
  int64_t column[Vectors], sample[Vectors];  // of the first target
};

// Transforms row I of the frequencies of all sources, to [source][frequency][vector].
template <class T, int Tile, int I, class Segment>
__attribute__((noinline)) void transform_input(const Work<T, Tile>& work, TileRows<T, Tile + 2> rows,
                                               const Segment& segment, T* to) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count, kAxis = Tile + 2, kVectors = Registers<Tile>::vectors;
  const int64_t chunk = work.layout.chunk;
  for (int64_t c = 0; c < work.sources; ++c, to += kAxis * kVectors * L) {
    for (int64_t v = 0; v < segment.count; ++v) {
      const int64_t at = segment.column[v] * chunk + segment.sample[v];
      V half[kAxis], mapped[kAxis];
#pragma GCC unroll 8
      for (int x = 0; x < kAxis; ++x) {
        V in[kAxis];
#pragma GCC unroll 8
        for (int y = 0; y < kAxis; ++y) in[y] = load(rows.row[y] + at + x * chunk);
        half[x] = input_frequency<Tile, I>(in);
      }
      InputTransform<Tile>::apply(half, mapped);
#pragma GCC unroll 8
      for (int x = 0; x < kAxis; ++x) store(to + (x * kVectors + v) * L, mapped[x]);
    }
    for (int y = 0; y < kAxis; ++y) rows.row[y] += rows.stride[y];
  }
}

// What the next row of tiles reads, and how much of it is fetched after each register tile.
template <class T>
struct BothAhead {
  Ahead<T> source, residual;
  int64_t source_lines = 0, residual_lines = 0;
};

// A register tile: products of one row of frequencies, transformed along that row, to [channel][column][vector].
template <class T, int Tile, int Vectors>
inline __attribute__((always_inline)) void tile(const T* in, const T* weights, int64_t count, T* to) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count;
  constexpr int kAxis = Tile + 2, kChannels = Registers<Tile>::channels, kVectors = Registers<Tile>::vectors;
  V sum[kChannels][Vectors][kAxis] = {};
  for (int64_t c = 0; c < count; ++c, in += kAxis * kVectors * L, weights += kAxis * kChannels) {
#pragma GCC unroll 8
    for (int x = 0; x < kAxis; ++x) {
      V line[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        line[v] = load(in + (x * kVectors + v) * L);
#if BSFAST_X86
        asm("" : "+v"(line[v]));  // else GCC reads it from memory again for each multiply-add
#endif
      }
#pragma GCC unroll 8
      for (int o = 0; o < kChannels; ++o) {
        const T w = weights[x * kChannels + o];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[o][v][x] += line[v] * w;
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kChannels; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      V mapped[Tile];
      OutputTransform<Tile>::apply(sum[o][v], mapped);
#pragma GCC unroll 8
      for (int x = 0; x < Tile; ++x) store(to + ((o * Tile + x) * kVectors + v) * L, mapped[x]);
    }
}

// All targets of one row of frequencies; fetches some of the rows ahead after each register tile.
template <class T, int Tile, int Vectors>
void multiply(const Work<T, Tile>& work, int64_t count, const T* panel, const T* packed, T* to, BothAhead<T>& ahead) {
  if constexpr (Vectors > 1)
    if (count < Vectors) return multiply<T, Tile, Vectors - 1>(work, count, panel, packed, to, ahead);
  constexpr int64_t kChannels = Registers<Tile>::channels;
  for (int64_t o = 0; o < work.padded_targets; o += kChannels) {
    tile<T, Tile, Vectors>(panel, packed, work.sources, to);
    packed += kChannels * work.kAxis * work.sources;
    to += kChannels * Tile * work.kVectors * work.L;
    ahead.source.fetch(ahead.source_lines);
    ahead.residual.fetch(ahead.residual_lines);
  }
}

// Row I of the frequencies of a segment, and those behind it.
template <class T, int Tile, class Segment, int I = 0>
void frequencies(const Work<T, Tile>& work, const TileRows<T, Tile + 2>& rows, const Segment& segment, const T* packed,
                 T* panel, T* products, BothAhead<T>& ahead) {
  if constexpr (I < Tile + 2) {
    transform_input<T, Tile, I>(work, rows, segment, panel);
    multiply<T, Tile, Registers<Tile>::vectors>(work, segment.count, panel, packed, products, ahead);
    packed += work.padded_targets * work.kAxis * work.sources;
    products += work.products();
    frequencies<T, Tile, Segment, I + 1>(work, rows, segment, packed, panel, products, ahead);
  }
}

// Transforms the products of a segment along columns, and stores what is inside the target.
template <class T, int Tile, class Segment>
void transform_output(const Work<T, Tile>& work, const Segment& segment, const T* from, int64_t height, int64_t width,
                      const TargetRow<T>& target) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count, kAxis = Tile + 2;
  for (int64_t o = 0; o < work.targets; ++o)
    for (int64_t x = 0; x < Tile; ++x, from += work.kVectors * L)
      for (int64_t v = 0; v < segment.count; ++v) {
        const int64_t column = segment.column[v] + x;
        if (column >= width) continue;
        V in[kAxis], mapped[Tile];
#pragma GCC unroll 8
        for (int y = 0; y < kAxis; ++y) in[y] = load(from + y * work.products() + v * L);
        OutputTransform<Tile>::apply(in, mapped);
#pragma GCC unroll 8
        for (int y = 0; y < Tile; ++y)
          if (y < height) target.put(o, y * width + column, segment.sample[v], mapped[y]);
      }
}

template <class T, int Tile>
void run_tiles(const WinogradPlan& plan, const GatherOperands<T>& operands, void* scratch, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<T>::count, kAxis = Tile + 2;
  const Work<T, Tile> work(plan);
  const ConvShape& s = plan.shape;
  const RowLayout& layout = work.layout;
  T* packed = static_cast<T*>(scratch);
  T* sums = packed + work.weights();
  T* memory = sums + work.sums();
  T* zeros = memory + work.row_elements();
  T* panel = zeros + layout.channel;
  T* products = panel + work.panel();
  SourceRows<T> staged{
      plan.columns, layout,          work.sources, plan.rows.source,
      s.samples,    operands.before, memory,       reinterpret_cast<int64_t*>(products + kAxis * work.products())};
  std::memset(zeros, 0, size_t(layout.channel) * sizeof(T));
  const int64_t source_image = work.sources * plan.rows.source * plan.columns.source * s.samples;
  const int64_t height = plan.target_size(0), width = plan.target_size(1), plane = height * width * s.samples;
  const Epilogue<T>& after = operands.after;
  const bool aligned = reinterpret_cast<uintptr_t>(operands.target) % kVectorBytes == 0 && s.samples % L == 0;
  const bool large = work.images() * s.groups * work.targets * plane * int64_t(sizeof(T)) > kStreamBytes;
  const int64_t products_of_row = ceil_div(work.line(), work.kVectors) * kAxis * work.padded_targets;
  BothAhead<T> ahead{{work.sources, plan.rows.source, plan.columns.source, s.samples, layout.chunk},
                     {work.targets, height, width, s.samples, layout.chunk}};
  int64_t image_before = -1, group_before = -1;  // whose rows are staged; whose weights are packed
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t h = unit % work.tile_rows() * Tile, chunk = unit / work.tile_rows() % layout.chunks;
    const int64_t image_group = unit / work.slices(), group = image_group % s.groups, image = image_group / s.groups;
    const int64_t branch_group = image / s.repeats * s.groups + group, first = chunk * layout.chunk;
    if (branch_group != group_before) {
      group_before = branch_group;
      pack_weights(work, operands.weight + branch_group * s.out_channels * s.in_channels * 9, packed);
    }
    if (unit / work.tile_rows() != image_before) {
      image_before = unit / work.tile_rows();
      staged.forget();
    }
    const int64_t source_index = s.shared_input && !plan.transposed ? image % s.repeats : image;
    const T* in = operands.source + (source_index * s.groups + group) * source_image;
    TileRows<T, kAxis> rows;
    rows.stage(staged, in, branch_group * work.sources, h + plan.rows.low, first, zeros);
    if (h + Tile < height)
      ahead.source.want(in, h + Tile + plan.rows.low + 2, Tile, first);
    else if (unit + 1 < end && layout.chunks == 1 && s.groups * s.repeats == 1 && !s.shared_input)
      ahead.source.want(operands.source + (source_index * s.groups + group + 1) * source_image, plan.rows.low, kAxis,
                        0);
    if (after.residual && h + Tile < height)
      ahead.residual.want(after.residual + image_group * work.targets * plane, h + Tile, Tile, first);
    else if (after.residual && unit + 1 < end && layout.chunks == 1)
      ahead.residual.want(after.residual + (image_group + 1) * work.targets * plane, 0, Tile, 0);
    ahead.source_lines = ceil_div(ahead.source.lines() * Registers<Tile>::channels, products_of_row);
    ahead.residual_lines = ceil_div(ahead.residual.lines() * Registers<Tile>::channels, products_of_row);
    const int64_t at = image_group * work.targets * plane + h * width * s.samples + first;
    const int64_t rows_here = height - h < Tile ? height - h : Tile;
    const TargetRow<T> to{operands.target + at,
                          after.residual ? after.residual + at : nullptr,
                          after.mask ? after.mask + at : nullptr,
                          after.scale ? after.scale + branch_group * work.targets : nullptr,
                          after.bias ? after.bias + branch_group * work.targets : nullptr,
                          after.moments ? sums : nullptr,
                          after.relu,
                          plane,
                          s.samples,
                          layout.chunk,
                          s.samples - first < layout.chunk ? s.samples - first : layout.chunk,
                          rows_here * width * layout.chunk,
                          layout.chunk == s.samples,
                          large && aligned};
    for (int64_t v = 0; v < work.line(); v += work.kVectors) {
      Segment<Registers<Tile>::vectors> segment;
      segment.count = work.line() - v < work.kVectors ? work.line() - v : work.kVectors;
      for (int64_t i = 0; i < segment.count; ++i) {
        segment.column[i] = (v + i) % work.tiles() * Tile;
        segment.sample[i] = (v + i) / work.tiles() * L;
      }
      frequencies(work, rows, segment, packed, panel, products, ahead);
      transform_output(work, segment, products, rows_here, width, to);
    }
    if (after.moments)
      for (int64_t o = 0; o < work.targets; ++o) after.moments[unit * work.targets + o] = to.moments(o);
  }
  stream_fence();
}

template <class T>
int64_t units(const WinogradPlan& plan) {
  return plan.tile == 4 ? Work<T, 4>(plan).units() : Work<T, 2>(plan).units();
}

template <class T>
int64_t slices(const WinogradPlan& plan) {
  return plan.tile == 4 ? Work<T, 4>(plan).slices() : Work<T, 2>(plan).slices();
}

template <class T>
size_t scratch_bytes(const WinogradPlan& plan) {
  return plan.tile == 4 ? Work<T, 4>(plan).bytes() : Work<T, 2>(plan).bytes();
}

template <class T>
void run(const WinogradPlan& plan, const GatherOperands<T>& operands, void* scratch, int64_t begin, int64_t end) {
  if (plan.tile == 4) return run_tiles<T, 4>(plan, operands, scratch, begin, end);
  run_tiles<T, 2>(plan, operands, scratch, begin, end);
}

}  // namespace

template <class T>
Winograd<T> winograd() {
  return {units<T>, slices<T>, scratch_bytes<T>, run<T>};
}
template Winograd<float> winograd<float>();
template Winograd<double> winograd<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
