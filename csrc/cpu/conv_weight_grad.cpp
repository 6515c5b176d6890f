// Weight gradient on the lines of conv_gather.cpp: each entry is the product of one line of the output's gradient with
// one shifted line of the input, so the whole is a matrix product whose operands are both given by pointers to rows. A
// tile of output channels x taps keeps one partial sum a lane in registers; the lanes are added up once, at the end.
#include "cpu/conv_weight_grad.h"

#include "cpu/ahead.h"
#include "cpu/source_rows.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

constexpr int kTaps = 3;                          // of a tile: those of one row of a 3x3 kernel share loads
constexpr int kChannels = kAccumulators / kTaps;  // of a tile
constexpr int64_t kBlock = 64;                    // vectors of a line taken at a time: a tile's fit 1st level
constexpr int64_t kLeastUnits = 16;               // enough to share evenly among some workers

template <class T>
struct Work {
  const WeightGradPlan& plan;
  RowLayout layout;
  int64_t taps, tap_tiles, parts;

  explicit Work(const WeightGradPlan& plan)
      : plan(plan),
        layout(plan.rows, plan.columns, plan.shape.in_channels, plan.shape.samples, Lanes<T>::count, sizeof(T)),
        taps(plan.shape.in_channels * plan.shape.taps()),
        tap_tiles(ceil_div(taps, kTaps)) {
    const int64_t whole = plan.shape.branches * plan.shape.groups;
    parts = whole < kLeastUnits ? ceil_div(kLeastUnits, whole) : 1;
    if (parts > lines()) parts = lines();
  }

  int64_t lines() const { return plan.shape.repeats * layout.chunks * plan.rows.target; }  // of a branch
  int64_t units() const { return plan.shape.branches * plan.shape.groups * parts; }
  bool dense() const { return layout.chunk == plan.shape.samples; }
  int64_t length() const { return plan.columns.target * layout.chunk; }
  // One vector of partial sums for each [tile of taps][channel][tap].
  int64_t sums() const { return tap_tiles * plan.shape.out_channels * kTaps * Lanes<T>::count; }
  int64_t row_elements() const { return round_up(layout.elements(kBlock * Lanes<T>::count), 64); }
  int64_t zeros() const { return round_up(layout.channel + kBlock * Lanes<T>::count, 64); }
  // A chunk of the gradient's line of every channel, where lines are not dense.
  int64_t staged_grad() const { return dense() ? 0 : round_up(plan.shape.out_channels * length(), 64); }
  size_t bytes() const {
    return size_t(sums() + row_elements() + zeros() + staged_grad()) * sizeof(T) +
           size_t(tap_tiles * kTaps + layout.slots + 64) * 8;
  }
};

// sums[o][t] += product of gradient line o with source line t, over `count` elements.
template <class T, int Channels>
__attribute__((noinline)) void tile(const T* grad, int64_t channel, const T* const* lines, int64_t at, int64_t count,
                                    T* sums) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count;
  V sum[Channels][kTaps];
#pragma GCC unroll 8
  for (int o = 0; o < Channels; ++o)
#pragma GCC unroll 3
    for (int t = 0; t < kTaps; ++t) sum[o][t] = load(sums + (o * kTaps + t) * L);
  const T *a = lines[0] + at, *b = lines[1] + at, *c = lines[2] + at, *g = grad + at;
  int64_t left = count;
  for (; left >= L; left -= L, a += L, b += L, c += L, g += L) {
    const V in[kTaps] = {load(a), load(b), load(c)};
#pragma GCC unroll 8
    for (int o = 0; o < Channels; ++o) {
      V d = load(g + o * channel);
#if BSFAST_X86
      asm("" : "+v"(d));  // else GCC reads it from memory again for each multiply-add
#endif
#pragma GCC unroll 3
      for (int t = 0; t < kTaps; ++t) sum[o][t] += d * in[t];
    }
  }
  if (left > 0) {
    const V in[kTaps] = {load_some(a, left), load_some(b, left), load_some(c, left)};
#pragma GCC unroll 8
    for (int o = 0; o < Channels; ++o) {
      const V d = load_some(g + o * channel, left);
#pragma GCC unroll 3
      for (int t = 0; t < kTaps; ++t) sum[o][t] += d * in[t];
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Channels; ++o)
#pragma GCC unroll 3
    for (int t = 0; t < kTaps; ++t) store(sums + (o * kTaps + t) * L, sum[o][t]);
}

// What the next rows of output read; a part of it is fetched after each tile.
template <class T>
struct Next {
  Ahead<T> x, grad;
  int64_t x_lines = 0, grad_lines = 0;

  void fetch() {
    x.fetch(x_lines);
    grad.fetch(grad_lines);
  }
};

// All taps of as many channels from `o` on as whole tiles have; moves `o` behind them.
template <class T, int Channels>
inline void tiles(const Work<T>& work, const T* grad, int64_t channel, const T* const* lines, const T* zeros,
                  int64_t at, int64_t count, int64_t& o, T* sums, Next<T>& next) {
  const int64_t channels = work.plan.shape.out_channels;
  for (; o + Channels <= channels; o += Channels)
    for (int64_t t = 0; t < work.tap_tiles; ++t) {
      const T* const* own = lines + t * kTaps;
      if (own[0] == zeros && own[1] == zeros && own[2] == zeros) continue;
      T* to = sums + (t * channels + o) * kTaps * Lanes<T>::count;
      tile<T, Channels>(grad + o * channel, channel, own, at, count, to);
      next.fetch();
    }
}

// Adds up the lanes, and puts the sums where they belong.
template <class T>
void reduce(const Work<T>& work, const T* sums, T* partial) {
  constexpr int64_t L = Lanes<T>::count;
  for (int64_t o = 0; o < work.plan.shape.out_channels; ++o)
    for (int64_t t = 0; t < work.taps; ++t) {
      const T* lanes = sums + ((t / kTaps * work.plan.shape.out_channels + o) * kTaps + t % kTaps) * L;
      partial[o * work.taps + t] = sum_of_lanes<T>(load(lanes));
    }
}

template <class T>
int64_t parts(const WeightGradPlan& plan) {
  return Work<T>(plan).parts;
}

template <class T>
int64_t units(const WeightGradPlan& plan) {
  return Work<T>(plan).units();
}

template <class T>
size_t scratch_bytes(const WeightGradPlan& plan) {
  return Work<T>(plan).bytes();
}

template <class T>
void run(const WeightGradPlan& plan, const T* x, const Prologue<T>& before, const T* grad, T* partial, void* scratch,
         int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<T>::count;
  const Work<T> work(plan);
  const ConvShape& s = plan.shape;
  const RowLayout& layout = work.layout;
  const Axis &rows = plan.rows, &columns = plan.columns;
  T* sums = static_cast<T*>(scratch);
  T* memory = sums + work.sums();
  T* zeros = memory + work.row_elements();
  T* staged_grad = zeros + work.zeros();
  const T** lines = reinterpret_cast<const T**>(staged_grad + work.staged_grad());
  SourceRows<T> staged{columns,   layout, s.in_channels, rows.source,
                       s.samples, before, memory,        reinterpret_cast<int64_t*>(lines + work.tap_tiles * kTaps)};
  std::memset(zeros, 0, size_t(work.zeros()) * sizeof(T));
  const int64_t tiles_of_row =
      ceil_div(work.length(), kBlock * L) * ceil_div(s.out_channels, kChannels) * work.tap_tiles;
  Next<T> next{{s.in_channels, rows.source, columns.source, s.samples, layout.chunk},
               {s.out_channels, rows.target, columns.target, s.samples, layout.chunk}};
  const int64_t x_image = s.in_channels * rows.source * columns.source * s.samples;
  const int64_t grad_plane = rows.target * columns.target * s.samples;
  const int64_t branch_weights = s.out_channels * work.taps;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % work.parts, group = unit / work.parts % s.groups;
    const int64_t branch = unit / work.parts / s.groups;
    std::memset(sums, 0, size_t(work.sums()) * sizeof(T));
    int64_t image_before = -1;
    for (int64_t i = work.lines() * part / work.parts; i < work.lines() * (part + 1) / work.parts; ++i) {
      const int64_t h = i % rows.target, chunk = i / rows.target % layout.chunks;
      const int64_t repeat = i / rows.target / layout.chunks, first = chunk * layout.chunk;
      if (i / rows.target != image_before) {
        image_before = i / rows.target;
        staged.forget();
      }
      const int64_t x_index = s.shared_input ? repeat : branch * s.repeats + repeat;
      const T* in = x + (x_index * s.groups + group) * x_image;
      const T* g = grad + ((branch * s.repeats + repeat) * s.groups + group) * s.out_channels * grad_plane +
                   h * columns.target * s.samples + first;
      next.x.want(in, (h + 1 + rows.high) * rows.phases, rows.phases, first);
      next.grad.want(g - h * columns.target * s.samples - first, h + 1, 1, first);
      next.x_lines = next.x.lines_a_turn(tiles_of_row);
      next.grad_lines = next.grad.lines_a_turn(tiles_of_row);
      int64_t channel = grad_plane;
      if (!work.dense()) {
        const int64_t here = s.samples - first < layout.chunk ? s.samples - first : layout.chunk;
        for (int64_t o = 0; o < s.out_channels; ++o)
          for (int64_t w = 0; w < columns.target; ++w) {
            T* to = staged_grad + o * work.length() + w * layout.chunk;
            std::memcpy(to, g + o * grad_plane + w * s.samples, size_t(here) * sizeof(T));
            std::memset(to + here, 0, size_t(layout.chunk - here) * sizeof(T));
          }
        g = staged_grad;
        channel = work.length();
      }
      for (int64_t k = 0; k < s.kernel[0]; ++k) {
        const Tap& tap = rows.taps[k];
        const int64_t index = (h + tap.shift) * rows.phases + tap.phase;
        const T* row = index < 0 || index >= rows.source
                           ? nullptr
                           : staged.get(in, (branch * s.groups + group) * s.in_channels, index, first);
        for (int64_t c = 0; c < s.in_channels; ++c)
          for (int64_t j = 0; j < s.kernel[1]; ++j)
            lines[c * s.taps() + k * s.kernel[1] + j] =
                row == nullptr ? zeros : row + layout.offset(c, columns.taps[j], columns.low);
      }
      for (int64_t used = work.taps; used < work.tap_tiles * kTaps; ++used) lines[used] = zeros;
      for (int64_t at = 0; at < work.length(); at += kBlock * L) {
        const int64_t count = work.length() - at < kBlock * L ? work.length() - at : kBlock * L;
        int64_t o = 0;
        tiles<T, kChannels>(work, g, channel, lines, zeros, at, count, o, sums, next);
        tiles<T, 4>(work, g, channel, lines, zeros, at, count, o, sums, next);
        tiles<T, 2>(work, g, channel, lines, zeros, at, count, o, sums, next);
        tiles<T, 1>(work, g, channel, lines, zeros, at, count, o, sums, next);
      }
    }
    reduce(work, sums,
           partial + part * s.branches * s.groups * branch_weights + (branch * s.groups + group) * branch_weights);
  }
}

}  // namespace

template <class T>
WeightGrad<T> weight_grad() {
  return {parts<T>, units<T>, scratch_bytes<T>, run<T>};
}
template WeightGrad<float> weight_grad<float>();
template WeightGrad<double> weight_grad<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
