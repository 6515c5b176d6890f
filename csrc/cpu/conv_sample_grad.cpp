// Per-sample weight gradient: a vector lane is a sample, so the register tile of output channels x taps that sums
// products over the positions of an image is the result itself, and no lanes are ever added up. The images of a few
// vectors of samples are copied into scratch first, padded with zeros, because in memory the positions of a vector lie
// a whole batch apart. There every tap is a fixed distance from its position, whatever stride and dilation.
#include "cpu/conv_sample_grad.h"

#include "cpu/lanes.h"

namespace bsfast {
namespace BSFAST_ISA {
namespace {

constexpr int kTaps = 3;                          // of a tile: those of one row of a 3x3 kernel
constexpr int kChannels = kAccumulators / kTaps;  // of a tile
constexpr int64_t kVectors = 2;                   // taken together, so that memory is read in runs of cache lines
constexpr int64_t kLeastUnits = 16;               // enough to share evenly among some workers
constexpr int64_t kScratchBytes = 768 * 1024;     // of a 1 MiB second-level cache, which also holds results

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How the work is cut; it depends on the shape alone.
template <class T>
struct Work {
  const ConvShape& s;
  int64_t seeds, height, width;    // of the output
  int64_t padded;                  // columns of a source row in scratch
  int64_t vectors, chunks, parts;  // vectors of samples in a chunk; chunks of samples; parts of the seeds
  int64_t rows;                    // of the output taken at a time

  explicit Work(const SampleGradPlan& plan)
      : s(plan.shape),
        seeds(plan.seeds),
        height(s.out_size(0)),
        width(s.out_size(1)),
        padded(s.stride[1] * larger(width - 1, 0) + s.dilation[1] * (s.kernel[1] - 1) + 1) {
    const int64_t all = ceil_div(s.samples, Lanes<T>::count), whole = s.branches * s.groups;
    vectors = smaller(kVectors, all);
    rows = 1;
    while (vectors > 1 &&
           (elements() * int64_t(sizeof(T)) > kScratchBytes || whole * ceil_div(all, vectors) < kLeastUnits))
      --vectors;
    chunks = ceil_div(all, vectors);
    parts = smaller(seeds, ceil_div(kLeastUnits, larger(whole * chunks, 1)));
    while (rows < height) {
      ++rows;
      if (elements() * int64_t(sizeof(T)) <= kScratchBytes) continue;
      --rows;
      break;
    }
    if (rows < height) rows = ceil_div(height, ceil_div(height, rows));  // of about one size
  }

  int64_t units() const { return s.branches * s.groups * chunks * parts; }
  int64_t taps() const { return s.in_channels * s.taps(); }
  int64_t source_rows(int64_t count) const { return (count - 1) * s.stride[0] + s.dilation[0] * (s.kernel[0] - 1) + 1; }
  // Of one vector of samples.
  int64_t source_elements() const { return s.in_channels * source_rows(rows) * padded * Lanes<T>::count; }
  int64_t grad_elements() const { return s.out_channels * rows * width * Lanes<T>::count; }
  int64_t elements() const { return vectors * (source_elements() + grad_elements()); }
};

// Some rows of one channel of an image, for some vectors of samples.
struct Window {
  int64_t first_row, rows, first_column, columns;
};

// Copies a window, one position every `step`, with zeros outside the image and in lanes beyond `count`; the vectors of
// samples of a position lie `vector` apart.
template <class T>
void pack(const Window& window, const T* in, int64_t height, int64_t width, int64_t pixel, int64_t count, T* out,
          int64_t step, int64_t vector) {
  constexpr int64_t L = Lanes<T>::count;
  const int64_t whole = count / L, left = count - whole * L;
  for (int64_t h = window.first_row; h < window.first_row + window.rows; ++h)
    for (int64_t w = window.first_column; w < window.first_column + window.columns; ++w, out += step) {
      const bool inside = h >= 0 && h < height && w >= 0 && w < width;
      const T* from = inside ? in + (h * width + w) * pixel : nullptr;
      const typename Lanes<T>::Vector zero{};
      for (int64_t v = 0; v < whole; ++v) store(out + v * vector, inside ? load(from + v * L) : zero);
      if (left > 0) store(out + whole * vector, inside ? load_some(from + whole * L, left) : zero);
    }
}

// Channels of the tile that begins at channel `o`.
int64_t tile_channels(int64_t o, int64_t channels) {
  for (int64_t size : {int64_t(kChannels), int64_t(4), int64_t(2)})
    if (o + size <= channels) return size;
  return 1;
}

// One vector of samples in scratch: sources as [channel][row][column][lane]; the gradient of each tile of channels as
// [row][column][channel][lane], one tile after the other.
template <class T>
struct Image {
  const T *source, *grad;
  int64_t source_row, step, width;  // of the source: strides of an output row and column; output columns
  T* out;                           // of the first weight
  int64_t weight, count;            // stride of a weight; samples
  bool first;                       // whether nothing is summed yet
};

// Stores sums of output channels x taps, or adds them to what is there.
template <class T>
void put(const Image<T>& image, const T* sums, int64_t channels, int64_t taps, T* out, int64_t channel) {
  constexpr int64_t L = Lanes<T>::count;
  for (int64_t o = 0; o < channels; ++o)
    for (int64_t t = 0; t < taps; ++t) {
      T* to = out + o * channel + t * image.weight;
      const auto sum = load(sums + (o * kTaps + t) * L);
      if (image.count == L) {
        store(to, image.first ? sum : load(to) + sum);
      } else {
        const auto value = image.first ? sum : load_some(to, image.count) + sum;
        store_some(to, image.count, value);
      }
    }
}

// sums[o][t] = sum over output rows [begin, end) of gradient channel o times source at tap t.
template <class T, int Channels>
__attribute__((noinline)) void tile(const Image<T>& image, const T* grad, const int64_t* offsets, int64_t begin,
                                    int64_t end, T* sums) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t L = Lanes<T>::count;
  V sum[Channels][kTaps]{};
  const T *row = image.source + begin * image.source_row, *g = grad + begin * image.width * Channels * L;
  const int64_t step = image.step, width = image.width;
  for (int64_t h = begin; h < end; ++h, row += image.source_row) {
    const T *a = row + offsets[0], *b = row + offsets[1], *c = row + offsets[2];
    for (int64_t w = 0; w < width; ++w, a += step, b += step, c += step, g += Channels * L) {
      const V in[kTaps] = {load(a), load(b), load(c)};
#pragma GCC unroll 8
      for (int o = 0; o < Channels; ++o) {
        V d = load(g + o * L);
#if BSFAST_X86
        asm("" : "+v"(d));  // else GCC reads it from memory again for each multiply-add
#endif
#pragma GCC unroll 3
        for (int t = 0; t < kTaps; ++t) sum[o][t] += d * in[t];
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Channels; ++o)
#pragma GCC unroll 3
    for (int t = 0; t < kTaps; ++t) store(sums + (o * kTaps + t) * L, sum[o][t]);
}

// Adds what output rows [first, first + rows) give to the gradient of all weights.
template <class T>
void add_rows(const Work<T>& work, const Image<T>& image, int64_t first, int64_t rows) {
  const ConvShape& s = work.s;
  constexpr int64_t L = Lanes<T>::count;
  const int64_t source_channel = work.source_rows(rows) * work.padded * L, channel = work.taps() * image.weight;
  alignas(64) T sums[kChannels * kTaps * L];
  for (int64_t tap = 0; tap < work.taps(); tap += kTaps) {
    const int64_t taps = smaller(kTaps, work.taps() - tap);
    int64_t offsets[kTaps], begin = rows, end = 0;
    for (int64_t t = 0; t < kTaps; ++t) {
      const int64_t at = tap + smaller(t, taps - 1), c = at / s.taps(), k = at % s.taps() / s.kernel[1];
      const int64_t row = s.dilation[0] * k, column = s.dilation[1] * (at % s.kernel[1]);
      offsets[t] = c * source_channel + (row * work.padded + column) * L;
      // Rows whose tap is inside the image: 0 <= stride * h + row - padding < size.
      const int64_t low = s.padding[0] - row, high = s.size[0] + s.padding[0] - row;
      begin = smaller(begin, larger(low > 0 ? ceil_div(low, s.stride[0]) - first : 0, 0));
      end = larger(end, smaller(high > 0 ? ceil_div(high, s.stride[0]) - first : 0, rows));
    }
    if (begin >= end && !image.first) continue;
    for (int64_t o = 0, size; o < s.out_channels; o += size) {
      size = tile_channels(o, s.out_channels);
      const T* grad = image.grad + o * rows * work.width * L;
      if (size == kChannels)
        tile<T, kChannels>(image, grad, offsets, begin, end, sums);
      else if (size == 4)
        tile<T, 4>(image, grad, offsets, begin, end, sums);
      else if (size == 2)
        tile<T, 2>(image, grad, offsets, begin, end, sums);
      else
        tile<T, 1>(image, grad, offsets, begin, end, sums);
      put(image, sums, size, taps, image.out + o * channel + tap * image.weight, channel);
    }
  }
}

template <class T>
int64_t units(const SampleGradPlan& plan) {
  return Work<T>(plan).units();
}

template <class T>
size_t scratch_bytes(const SampleGradPlan& plan) {
  return size_t(Work<T>(plan).elements()) * sizeof(T);
}

template <class T>
void run(const SampleGradPlan& plan, const T* x, const T* grad, T* out, void* scratch, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<T>::count;
  const Work<T> work(plan);
  const ConvShape& s = plan.shape;
  const int64_t all = plan.seeds * s.samples, source_vector = work.source_elements(),
                grad_vector = work.grad_elements();
  T *source_memory = static_cast<T*>(scratch), *grad_memory = source_memory + work.vectors * source_vector;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % work.parts, chunk = unit / work.parts % work.chunks;
    const int64_t group = unit / work.parts / work.chunks % s.groups;
    const int64_t branch = unit / work.parts / work.chunks / s.groups;
    const int64_t sample = chunk * work.vectors * L, here = smaller(work.vectors * L, s.samples - sample);
    const int64_t own = branch * s.groups + group, x_plane = s.size[0] * s.size[1] * s.samples;
    const int64_t grad_plane = work.height * work.width * all;
    const T* in = x + (s.shared_input ? group : own) * s.in_channels * x_plane + sample;
    const T* g = grad + own * s.out_channels * grad_plane + sample;
    T* to = out + own * s.out_channels * work.taps() * all + sample;
    for (int64_t h = 0; h < work.height; h += work.rows) {
      const int64_t rows = smaller(work.rows, work.height - h);
      const Window source{h * s.stride[0] - s.padding[0], work.source_rows(rows), -s.padding[1], work.padded};
      for (int64_t c = 0; c < s.in_channels; ++c)
        pack(source, in + c * x_plane, s.size[0], s.size[1], s.samples, here,
             source_memory + c * source.rows * source.columns * L, L, source_vector);
      const Window target{h, rows, 0, work.width};
      for (int64_t seed = plan.seeds * part / work.parts; seed < plan.seeds * (part + 1) / work.parts; ++seed) {
        for (int64_t o = 0, size; o < s.out_channels; o += size) {
          size = tile_channels(o, s.out_channels);
          for (int64_t i = 0; i < size; ++i)
            pack(target, g + seed * s.samples + (o + i) * grad_plane, work.height, work.width, all, here,
                 grad_memory + (o * rows * work.width + i) * L, size * L, grad_vector);
        }
        for (int64_t v = 0; v * L < here; ++v) {
          const Image<T> image{source_memory + v * source_vector,
                               grad_memory + v * grad_vector,
                               s.stride[0] * work.padded * L,
                               s.stride[1] * L,
                               work.width,
                               to + seed * s.samples + v * L,
                               all,
                               smaller(L, here - v * L),
                               h == 0};
          add_rows(work, image, h, rows);
        }
      }
    }
  }
}

}  // namespace

template <class T>
SampleGrad<T> sample_grad() {
  return {units<T>, scratch_bytes<T>, run<T>};
}
template SampleGrad<float> sample_grad<float>();
template SampleGrad<double> sample_grad<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
