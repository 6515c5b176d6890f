// Weight gradient for few samples: the vector lanes hold a patch of an input row, [column tap][channel], which lies
// side by side once the row is transposed. One number of the output's gradient multiplies it whole, so that nothing is
// added up between lanes, however few the samples and the columns are.
#include "cpu/conv_weight_grad.h"
#include "cpu/lanes.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

constexpr int kVectors = 3;                          // of a tile
constexpr int kChannels = kAccumulators / kVectors;  // of the output, of a tile
constexpr int64_t kBandBytes = 24 * 1024;            // of transposed rows at a time: tiles read them from 1st level
constexpr int64_t kLongestSum = 4096;                // of products one after another, whose rounding errors add up
constexpr int64_t kLeastUnits = 16;                  // enough to share evenly among some workers

template <class T>
struct Work {
  const WeightGradPlan& plan;
  int64_t patch, vectors;  // elements and vectors of a patch
  int64_t row;             // elements of a transposed row
  int64_t band;            // output rows taken at a time
  int64_t lines, parts;    // output rows of a branch, and in how many parts they are added up

  explicit Work(const WeightGradPlan& plan) : plan(plan) {
    const ConvShape& s = plan.shape;
    patch = s.kernel[1] * s.in_channels;
    vectors = ceil_div(patch, Lanes<T>::count);
    row = ((plan.columns.target - 1) * s.stride[1] + s.kernel[1]) * s.in_channels;
    const int64_t fit = kBandBytes / (row * s.stride[0] * int64_t(sizeof(T)) + 1);
    band = fit < 1 ? 1 : fit < plan.rows.target ? fit : plan.rows.target;
    lines = plan.columns.target > 0 ? s.repeats * s.samples * plan.rows.target : 0;
    const int64_t whole = s.branches * s.groups, least = whole < kLeastUnits ? ceil_div(kLeastUnits, whole) : 1;
    const int64_t exact = ceil_div(lines * plan.columns.target, kLongestSum), wanted = least < exact ? exact : least;
    parts = wanted < lines ? wanted : lines;
  }

  int64_t units() const { return plan.shape.branches * plan.shape.groups * parts; }
  int64_t rows(int64_t targets) const {  // of the input, for so many of the output
    const ConvShape& s = plan.shape;
    return (targets - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1;
  }
  int64_t sums() const { return plan.shape.kernel[0] * plan.shape.out_channels * vectors * Lanes<T>::count; }
  int64_t staged() const { return round_up(rows(band) * row + kVectors * Lanes<T>::count, 64); }
  size_t bytes() const { return size_t(round_up(sums(), 64) + staged()) * sizeof(T); }
};

// Some output rows of one sample, of which input rows [from, to) of those staged are inside the image.
template <class T>
struct Band {
  const T *x, *grad;
  int64_t height, width;  // of the output
  int64_t from, to;
  int64_t row, row_step, pixel_step;      // strides of x: of a row, an output row, an output pixel
  int64_t channel, grad_row, grad_pixel;  // strides of grad
};

// sums[o][v] += gradient of channel o times vector v of the patches of one row of taps.
template <class T, int Channels, int Vectors>
__attribute__((noinline)) void tile(const Band<T>& band, int64_t tap_row, int64_t first, const T* grad, int64_t stride,
                                    T* sums) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count;
  V sum[Channels][Vectors];
#pragma GCC unroll 8
  for (int o = 0; o < Channels; ++o)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sum[o][v] = load(sums + o * stride + v * L);
  for (int64_t h = 0; h < band.height; ++h) {
    const int64_t source = h * band.row_step + tap_row;
    if (source < band.from || source >= band.to) continue;
    const T *x = band.x + source * band.row + first, *g = grad + h * band.grad_row;
    for (int64_t w = 0; w < band.width; ++w, x += band.pixel_step, g += band.grad_pixel) {
      V in[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) in[v] = load(x + v * L);
#pragma GCC unroll 8
      for (int o = 0; o < Channels; ++o) {
        const T d = g[o * band.channel];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) sum[o][v] += in[v] * d;
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Channels; ++o)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) store(sums + o * stride + v * L, sum[o][v]);
}

// All vectors of a patch, for as many output channels from `o` on as whole tiles have; moves `o` behind them.
template <class T, int Channels>
void tiles(const Work<T>& work, const Band<T>& band, int64_t tap_row, int64_t& o, T* sums) {
  constexpr int64_t L = Lanes<T>::count;
  const int64_t stride = work.vectors * L;
  for (; o + Channels <= work.plan.shape.out_channels; o += Channels) {
    const T* grad = band.grad + o * band.channel;
    T* to = sums + o * stride;
    int64_t v = 0;
    for (; v + 3 <= work.vectors; v += 3) tile<T, Channels, 3>(band, tap_row, v * L, grad, stride, to + v * L);
    if (work.vectors - v == 2)
      tile<T, Channels, 2>(band, tap_row, v * L, grad, stride, to + v * L);
    else if (work.vectors - v == 1)
      tile<T, Channels, 1>(band, tap_row, v * L, grad, stride, to + v * L);
  }
}

// Transposes an input row of one sample, through the prologue, between zeros.
template <class T>
void transpose(const Work<T>& work, const T* in, const Prologue<T>& before, int64_t channel, T* out) {
  const ConvShape& s = work.plan.shape;
  const int64_t plane = s.size[0] * s.size[1] * s.samples, positions = work.row / s.in_channels;
  const int64_t begin = s.padding[1], end = begin + s.size[1] < positions ? begin + s.size[1] : positions;
  std::memset(out, 0, size_t(work.row) * sizeof(T));
  for (int64_t c = 0; c < s.in_channels; ++c) {
    const T scale = before.scale ? before.scale[channel + c] : T(1);
    const T shift = before.scale ? before.shift[channel + c] : T(0);
    const T* from = in + c * plane;
    T* to = out + begin * s.in_channels + c;
    for (int64_t w = begin; w < end; ++w, from += s.samples, to += s.in_channels) {
      const T value = *from * scale + shift;
      *to = before.relu && value < T(0) ? T(0) : value;
    }
  }
}

// Puts the sums where they belong.
template <class T>
void reorder(const Work<T>& work, const T* sums, T* partial) {
  const ConvShape& s = work.plan.shape;
  const int64_t stride = work.vectors * Lanes<T>::count;
  for (int64_t i = 0; i < s.kernel[0]; ++i)
    for (int64_t o = 0; o < s.out_channels; ++o, sums += stride)
      for (int64_t j = 0; j < s.kernel[1]; ++j)
        for (int64_t c = 0; c < s.in_channels; ++c)
          partial[(o * s.in_channels + c) * s.taps() + i * s.kernel[1] + j] = sums[j * s.in_channels + c];
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
  const Work<T> work(plan);
  const ConvShape& s = plan.shape;
  const int64_t height = plan.rows.target, width = plan.columns.target;
  T* sums = static_cast<T*>(scratch);
  T* staged = sums + round_up(work.sums(), 64);
  std::memset(staged, 0, size_t(work.staged()) * sizeof(T));
  const int64_t x_image = s.in_channels * s.size[0] * s.size[1] * s.samples;
  const int64_t grad_plane = height * width * s.samples;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % work.parts, group = unit / work.parts % s.groups;
    const int64_t branch = unit / work.parts / s.groups, channel = (branch * s.groups + group) * s.in_channels;
    std::memset(sums, 0, size_t(work.sums()) * sizeof(T));
    const int64_t last = work.lines * (part + 1) / work.parts;
    for (int64_t i = work.lines * part / work.parts, taken; i < last; i += taken) {
      const int64_t h = i % height, sample = i / height % s.samples, repeat = i / height / s.samples;
      taken = height - h < work.band ? height - h : work.band;
      if (taken > last - i) taken = last - i;
      const int64_t x_index = s.shared_input ? repeat : branch * s.repeats + repeat;
      const T* in = x + (x_index * s.groups + group) * x_image + sample;
      const T* g = grad + ((branch * s.repeats + repeat) * s.groups + group) * s.out_channels * grad_plane + sample;
      const int64_t top = h * s.stride[0] - s.padding[0], rows = work.rows(taken);
      const int64_t from = top < 0 ? -top : 0, to = s.size[0] - top < rows ? s.size[0] - top : rows;
      for (int64_t r = from; r < to; ++r)
        transpose(work, in + (top + r) * s.size[1] * s.samples, before, channel, staged + r * work.row);
      const Band<T> band{staged,
                         g + h * width * s.samples,
                         taken,
                         width,
                         from,
                         to,
                         work.row,
                         s.stride[0],
                         s.stride[1] * s.in_channels,
                         grad_plane,
                         width * s.samples,
                         s.samples};
      for (int64_t k = 0; k < s.kernel[0]; ++k) {
        T* own = sums + k * s.out_channels * work.vectors * Lanes<T>::count;
        int64_t o = 0;
        tiles<T, kChannels>(work, band, k * s.dilation[0], o, own);
        tiles<T, 2>(work, band, k * s.dilation[0], o, own);
        tiles<T, 1>(work, band, k * s.dilation[0], o, own);
      }
    }
    reorder(work, sums,
            partial +
                (part * s.branches * s.groups + branch * s.groups + group) * s.out_channels * s.in_channels * s.taps());
  }
}

}  // namespace

template <class T>
WeightGrad<T> weight_grad_patches() {
  return {parts<T>, units<T>, scratch_bytes<T>, run<T>};
}
template WeightGrad<float> weight_grad_patches<float>();
template WeightGrad<double> weight_grad_patches<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
