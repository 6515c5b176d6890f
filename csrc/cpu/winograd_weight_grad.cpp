// Weight gradient by Winograd's minimal filtering with samples in the vector lanes. Each frequency is the product of
// one transformed line of the output's gradient with one of the input, a line being the vectors of a row of tiles in
// the order (vector of samples, tile); a register tile of output channels x input channels keeps a sum a lane.
#include "cpu/winograd_weight_grad.h"

#include "cpu/source_rows.h"
#include "cpu/winograd_rows.h"
#include "cpu/winograd_transforms.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

constexpr int kInputs = 3;                         // of a register tile
constexpr int kOutputs = kAccumulators / kInputs;  // of a register tile
constexpr int64_t kLeastUnits = 16;                // enough to share evenly among some workers
constexpr int64_t kLineBytes = 384 * 1024;         // transformed lines of a row of frequencies
constexpr int64_t kPartBytes = 16;                 // of a sum that is kept in memory

// Sizes that one worker needs, for one plan.
template <class T, int Tile>
struct Work {
  static constexpr int64_t L = Lanes<T>::count, kAxis = Tile + 2, kPart = kPartBytes / sizeof(T);
  const WinogradWeightGradPlan& plan;
  int64_t inputs, outputs, chunk;
  RowLayout layout, grad_layout;
  int64_t segment, stride;  // vectors of a line taken at a time; between lines
  int64_t parts;

  static int64_t chunk_of(const WinogradWeightGradPlan& plan) {
    const int64_t inputs = plan.shape.in_channels, outputs = plan.shape.out_channels, samples = plan.shape.samples;
    const int64_t a_sample =
        (kAxis * inputs * (plan.columns.target + 2) + Tile * outputs * plan.columns.target) * int64_t(sizeof(T));
    return whole_chunk(samples, a_sample, L);
  }

  explicit Work(const WinogradWeightGradPlan& plan)
      : plan(plan),
        inputs(plan.shape.in_channels),
        outputs(plan.shape.out_channels),
        chunk(chunk_of(plan)),
        layout(whole_layout(plan.rows, plan.columns, inputs, plan.shape.samples, chunk, L, sizeof(T))),
        grad_layout(whole_layout(plan.grad_rows, plan.grad_columns, outputs, plan.shape.samples, chunk, L, sizeof(T))) {
    const int64_t fit = kLineBytes / (kAxis * (inputs + outputs) * kVectorBytes);
    segment = ceil_div(line(), ceil_div(line(), fit < 4 ? 4 : fit));
    stride = (segment | 1) * L;  // a power of two would put all lines into the same sets of the caches
    const int64_t whole = plan.shape.branches * plan.shape.groups;
    parts = whole < kLeastUnits ? ceil_div(kLeastUnits, whole) : 1;
    if (parts > lines()) parts = lines();
  }

  int64_t tiles() const { return plan.columns.target / Tile; }  // of a row
  int64_t line() const { return tiles() * chunk / L; }
  int64_t tile_rows() const { return plan.rows.target / Tile; }
  int64_t lines() const { return plan.shape.repeats * layout.chunks * tile_rows(); }  // of a branch
  int64_t units() const { return plan.shape.branches * plan.shape.groups * parts; }
  int64_t sums() const { return round_up(kAxis * kAxis * outputs * inputs * kPart, 64); }
  int64_t row_elements() const { return round_up(layout.elements(0), 64); }
  int64_t grad_elements() const { return round_up(grad_layout.elements(0), 64); }
  size_t bytes() const {
    return size_t(sums() + row_elements() + grad_elements() + layout.channel + kAxis * (inputs + outputs) * stride) *
               sizeof(T) +
           size_t(layout.slots + grad_layout.slots) * 8;
  }
};

// Transforms row I of the frequencies of vectors [at, at + count) of all channels, to [frequency][channel][vector]:
// Map is that along rows, Combine that of columns.
template <class T, int Tile, class Map, class Combine>
__attribute__((noinline)) void transform(const Work<T, Tile>& work, const TileRows<T, Map::in>& rows, int64_t channels,
                                         int64_t at, int64_t count, T* to, Combine combine) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count, kAxis = Tile + 2;
  for (int64_t c = 0; c < channels; ++c, to += work.stride) {
    const T* from[Map::in];
    for (int y = 0; y < Map::in; ++y) from[y] = rows.row[y] + c * rows.stride[y];
    int64_t t = at % work.tiles(), n = at / work.tiles() * L;
    for (int64_t v = 0; v < count; ++v) {
      const int64_t first = t * Tile * work.chunk + n;
      V half[Map::in], mapped[kAxis];
#pragma GCC unroll 8
      for (int x = 0; x < Map::in; ++x) {
        V in[Map::in];
#pragma GCC unroll 8
        for (int y = 0; y < Map::in; ++y) in[y] = load(from[y] + first + x * work.chunk);
        half[x] = combine(in);
      }
      Map::apply(half, mapped);
#pragma GCC unroll 8
      for (int x = 0; x < kAxis; ++x) store(to + x * channels * work.stride + v * L, mapped[x]);
      if (++t == work.tiles()) {
        t = 0;
        n += L;
      }
    }
  }
}

// Adds what remains of a vector when its halves are added up down to the size of a part.
template <class T>
inline __attribute__((always_inline)) void add_part(const void* vector, T* sum) {
  auto part = folded<T, kPartBytes>(vector), before = part;
  std::memcpy(&before, sum, kPartBytes);
  before += part;
  std::memcpy(sum, &before, kPartBytes);
}

// What the next row of tiles reads.
template <class T>
struct BothAhead {
  Ahead<T> x, grad;
};

// sums[o][c] += product of gradient line o with input line c, over `count` vectors.
template <class T, int Outputs, int Inputs>
__attribute__((noinline)) void tile(const T* grad, const T* in, int64_t stride, int64_t count, T* sums, int64_t row,
                                    const T* ahead, const T* grad_ahead) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count;
  constexpr int64_t kLine = 64 / sizeof(T);
  V sum[Outputs][Inputs] = {};
  const T* lines[Inputs];
  for (int c = 0; c < Inputs; ++c) lines[c] = in + c * stride;
  for (int64_t v = 0; v < count; ++v, grad += L) {
    __builtin_prefetch(ahead + v * kLine, 0, 2);
    __builtin_prefetch(grad_ahead + v * kLine, 0, 2);
    V x[Inputs];
#pragma GCC unroll 8
    for (int c = 0; c < Inputs; ++c) x[c] = load(lines[c] + v * L);
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) {
      V g = load(grad + o * stride);
#if BSFAST_X86
      asm("" : "+v"(g));  // else GCC reads it from memory again for each multiply-add
#endif
#pragma GCC unroll 8
      for (int c = 0; c < Inputs; ++c) sum[o][c] += g * x[c];
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; ++o)
#pragma GCC unroll 8
    for (int c = 0; c < Inputs; ++c) add_part<T>(&sum[o][c], sums + o * row + c * (kPartBytes / int64_t(sizeof(T))));
}

// As many output channels from `o` on as whole register tiles have; moves `o` behind them.
template <class T, int Tile, int Outputs>
inline void tiles(const Work<T, Tile>& work, const T* grad, const T* in, int64_t count, int64_t& o, T* sums,
                  BothAhead<T>& ahead) {
  constexpr int64_t kPart = Work<T, Tile>::kPart;
  const int64_t row = work.inputs * kPart, stride = work.stride;
  for (; o + Outputs <= work.outputs; o += Outputs) {
    int64_t c = 0;
    for (; c + kInputs <= work.inputs; c += kInputs)
      tile<T, Outputs, kInputs>(grad + o * stride, in + c * stride, stride, count, sums + o * row + c * kPart, row,
                                ahead.x.take(count, in), ahead.grad.take(count, grad));
    if (work.inputs - c == 2)
      tile<T, Outputs, 2>(grad + o * stride, in + c * stride, stride, count, sums + o * row + c * kPart, row,
                          ahead.x.take(count, in), ahead.grad.take(count, grad));
    else if (work.inputs - c == 1)
      tile<T, Outputs, 1>(grad + o * stride, in + c * stride, stride, count, sums + o * row + c * kPart, row,
                          ahead.x.take(count, in), ahead.grad.take(count, grad));
  }
}

// Row I of the frequencies of a segment, and those behind it.
template <class T, int Tile, int I = 0>
void frequencies(const Work<T, Tile>& work, const TileRows<T, Tile + 2>& rows, const TileRows<T, Tile>& grad_rows,
                 int64_t at, int64_t count, T* lines, T* sums, BothAhead<T>& ahead) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t kAxis = Tile + 2;
  if constexpr (I < kAxis) {
    T* grad_lines = lines + kAxis * work.inputs * work.stride;
    transform<T, Tile, InputTransform<Tile>>(
        work, rows, work.inputs, at, count, lines,
        [](const V(&in)[kAxis]) __attribute__((always_inline)) { return input_frequency<Tile, I>(in); });
    transform<T, Tile, GradTransform<Tile>>(work, grad_rows, work.outputs, at, count, grad_lines,
                                            [](const V(&in)[Tile])
                                                __attribute__((always_inline)) { return grad_frequency<Tile, I>(in); });
    for (int64_t x = 0; x < kAxis; ++x) {
      const T* in = lines + x * work.inputs * work.stride;
      const T* grad = grad_lines + x * work.outputs * work.stride;
      T* own = sums + (I * kAxis + x) * work.outputs * work.inputs * work.kPart;
      int64_t o = 0;
      tiles<T, Tile, kOutputs>(work, grad, in, count, o, own, ahead);
      tiles<T, Tile, 4>(work, grad, in, count, o, own, ahead);
      tiles<T, Tile, 2>(work, grad, in, count, o, own, ahead);
      tiles<T, Tile, 1>(work, grad, in, count, o, own, ahead);
    }
    frequencies<T, Tile, I + 1>(work, rows, grad_rows, at, count, lines, sums, ahead);
  }
}

// Adds up the parts of the sums, and transforms frequencies to taps.
template <class T, int Tile>
void reduce(const Work<T, Tile>& work, const T* sums, T* partial) {
  constexpr int64_t kAxis = Tile + 2, kAtOnce = 8, kPart = Work<T, Tile>::kPart;
  typedef T Several __attribute__((vector_size(kAtOnce * sizeof(T))));
  const int64_t pairs = work.outputs * work.inputs;
  for (int64_t first = 0; first < pairs; first += kAtOnce) {
    Several in[kAxis][kAxis] = {}, taps[3][3];
    const int64_t here = pairs - first < kAtOnce ? pairs - first : kAtOnce;
    for (int64_t f = 0; f < kAxis * kAxis; ++f)
      for (int64_t k = 0; k < here; ++k) {
        const T* part = sums + (f * pairs + first + k) * kPart;
        T sum = part[0] + part[1];
        if constexpr (kPart == 4) sum += part[2] + part[3];
        in[f / kAxis][f % kAxis][k] = sum;
      }
    both_axes<KernelGradTransform<Tile>>(in, taps);
    for (int64_t k = 0; k < here; ++k)
      for (int64_t i = 0; i < 9; ++i) partial[(first + k) * 9 + i] = taps[i / 3][i % 3][k];
  }
}

template <class T, int Tile>
void run_tiles(const WinogradWeightGradPlan& plan, const T* x, const Prologue<T>& before, const T* grad, T* partial,
               void* scratch, int64_t begin, int64_t end) {
  constexpr int64_t kAxis = Tile + 2;
  const Work<T, Tile> work(plan);
  const ConvShape& s = plan.shape;
  T* sums = static_cast<T*>(scratch);
  T* memory = sums + work.sums();
  T* grad_memory = memory + work.row_elements();
  T* lines = grad_memory + work.grad_elements();
  T* zeros = lines + kAxis * (work.inputs + work.outputs) * work.stride;
  int64_t* held = reinterpret_cast<int64_t*>(zeros + work.layout.channel);
  SourceRows<T> staged{plan.columns, work.layout, work.inputs, plan.rows.source, s.samples, before, memory, held};
  SourceRows<T> staged_grad{
      plan.grad_columns, work.grad_layout,        work.outputs, plan.grad_rows.source, s.samples, {},
      grad_memory,       held + work.layout.slots};
  std::memset(zeros, 0, size_t(work.layout.channel) * sizeof(T));
  BothAhead<T> ahead{{work.inputs, plan.rows.source, plan.columns.source, s.samples, work.chunk},
                     {work.outputs, plan.grad_rows.source, plan.grad_columns.source, s.samples, work.chunk}};
  const int64_t x_image = s.in_channels * s.size[0] * s.size[1] * s.samples;
  const int64_t grad_image = s.out_channels * s.out_size(0) * s.out_size(1) * s.samples;
  const int64_t group_weights = s.out_channels * s.in_channels * 9;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % work.parts, group = unit / work.parts % s.groups;
    const int64_t branch = unit / work.parts / s.groups;
    std::memset(sums, 0, size_t(work.sums()) * sizeof(T));
    int64_t image_before = -1;
    for (int64_t i = work.lines() * part / work.parts; i < work.lines() * (part + 1) / work.parts; ++i) {
      const int64_t row = i % work.tile_rows(), chunk = i / work.tile_rows() % work.layout.chunks;
      const int64_t repeat = i / work.tile_rows() / work.layout.chunks, first = chunk * work.chunk;
      if (i / work.tile_rows() != image_before) {
        image_before = i / work.tile_rows();
        staged.forget();
      }
      staged_grad.forget();
      const int64_t x_index = s.shared_input ? repeat : branch * s.repeats + repeat;
      const T* in = x + (x_index * s.groups + group) * x_image;
      const T* g = grad + ((branch * s.repeats + repeat) * s.groups + group) * grad_image;
      const int64_t h = row * Tile;
      TileRows<T, kAxis> rows;
      TileRows<T, Tile> grad_rows;
      rows.stage(staged, in, (branch * s.groups + group) * s.in_channels, h + plan.rows.low, first, zeros);
      grad_rows.stage(staged_grad, g, 0, h, first, zeros);
      if (row + 1 < work.tile_rows()) {
        ahead.x.want(in, h + Tile + plan.rows.low + 2, Tile, first);
        ahead.grad.want(g, h + Tile, Tile, first);
      } else if (work.layout.chunks == 1 && unit + 1 < end && s.groups * s.repeats == 1 && work.parts == 1) {
        ahead.x.want(s.shared_input ? in : in + x_image, plan.rows.low, kAxis, first);
        ahead.grad.want(g + grad_image, 0, Tile, first);
      }
      for (int64_t at = 0; at < work.line(); at += work.segment) {
        const int64_t count = work.line() - at < work.segment ? work.line() - at : work.segment;
        frequencies<T, Tile>(work, rows, grad_rows, at, count, lines, sums, ahead);
      }
    }
    reduce(work, sums, partial + ((part * s.branches + branch) * s.groups + group) * group_weights);
  }
}

template <class T>
int64_t parts(const WinogradWeightGradPlan& plan) {
  return plan.tile == 4 ? Work<T, 4>(plan).parts : Work<T, 2>(plan).parts;
}

template <class T>
int64_t units(const WinogradWeightGradPlan& plan) {
  return plan.tile == 4 ? Work<T, 4>(plan).units() : Work<T, 2>(plan).units();
}

template <class T>
size_t scratch_bytes(const WinogradWeightGradPlan& plan) {
  return plan.tile == 4 ? Work<T, 4>(plan).bytes() : Work<T, 2>(plan).bytes();
}

template <class T>
void run(const WinogradWeightGradPlan& plan, const T* x, const Prologue<T>& before, const T* grad, T* partial,
         void* scratch, int64_t begin, int64_t end) {
  if (plan.tile == 4) return run_tiles<T, 4>(plan, x, before, grad, partial, scratch, begin, end);
  run_tiles<T, 2>(plan, x, before, grad, partial, scratch, begin, end);
}

}  // namespace

template <class T>
WinogradWeightGrad<T> winograd_weight_grad() {
  return {parts<T>, units<T>, scratch_bytes<T>, run<T>};
}
template WinogradWeightGrad<float> winograd_weight_grad<float>();
template WinogradWeightGrad<double> winograd_weight_grad<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
