// 3x3 stride-1 convolution with samples in the vector lanes, written over the vector width and compiled per instruction
// set (BSFAST_ISA). A worker keeps the three padded input rows it needs in scratch, blocked by lanes, so that every
// load of the register tile is one aligned vector; each input row is read once, contiguously.
#include "cpu/conv3x3.h"

#include <cstring>

#if BSFAST_X86
#include <immintrin.h>
#endif

namespace bsfast {
namespace BSFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
// Accumulators of one tile: 24 of 32 registers on AVX-512, 8 of 16 elsewhere, beside the inputs and the weight.
constexpr int kTileChannels = kVectorBytes == 64 ? 8 : 4;
constexpr int kTilePixels = kVectorBytes == 64 ? 3 : 2;
constexpr int64_t kScratchBytes = 512 * 1024;  // half of a 1 MiB second-level cache
// Larger results cannot stay in the last-level cache: they bypass it, which saves reading each line before writing it.
constexpr int64_t kStreamBytes = 16 * 1024 * 1024;

template <class T>
struct Lanes {
  static constexpr int64_t count = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(sizeof(T))));
};

// Stores one full, aligned vector past the caches.
template <class V>
inline void stream(void* out, V value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(out), (__m512i)value);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(out), (__m256i)value);
#elif BSFAST_X86
  _mm_stream_si128(static_cast<__m128i*>(out), (__m128i)value);
#else
  *static_cast<V*>(out) = value;
#endif
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of the scratch: three rows and one branch's weights, packed by blocks of output channels.
template <class T>
struct Plan {
  int64_t lane_blocks, padded_width, row_size, weight_size, chunks, padded_channels;

  explicit Plan(const ConvShape& s) {
    constexpr int64_t L = Lanes<T>::count;
    padded_width = s.width + 2 * s.pad_width;
    const int64_t block_bytes = 3 * s.in_channels * padded_width * kVectorBytes;
    const int64_t all_blocks = ceil_div(s.samples, L);
    const int64_t fit = kScratchBytes / (block_bytes + 1);
    lane_blocks = fit < 1 ? 1 : fit < all_blocks ? fit : all_blocks;
    chunks = ceil_div(all_blocks, lane_blocks);
    row_size = lane_blocks * s.in_channels * padded_width * L;
    padded_channels = ceil_div(s.out_channels, kTileChannels) * kTileChannels;
    weight_size = padded_channels * s.in_channels * 9;
  }
};

// Copies input row `h` of one branch into scratch as [lane block][channel][padded column][lane]; rows outside are zero.
template <class T>
void stage_row(const ConvShape& s, const Plan<T>& plan, const T* x, int64_t h, int64_t first_sample, T* row) {
  using V = typename Lanes<T>::Vector;
  using U = typename Lanes<T>::Unaligned;
  constexpr int64_t L = Lanes<T>::count;
  if (h < 0 || h >= s.height) {
    std::memset(row, 0, plan.row_size * sizeof(T));
    return;
  }
  const int64_t block_stride = s.in_channels * plan.padded_width;
  const int64_t left = s.samples - first_sample;
  const int64_t full = left / L < plan.lane_blocks ? left / L : plan.lane_blocks;
  const int64_t rest = full < plan.lane_blocks ? left - full * L : 0;
  V* out = reinterpret_cast<V*>(row);
  for (int64_t c = 0; c < s.in_channels; ++c) {
    const T* in = x + ((c * s.height + h) * s.width) * s.samples + first_sample;
    V* channel = out + c * plan.padded_width;
    for (int64_t b = 0; b < plan.lane_blocks; ++b)
      for (int64_t p = 0; p < s.pad_width; ++p)
        channel[b * block_stride + p] = channel[b * block_stride + plan.padded_width - 1 - p] = V{};
    for (int64_t w = 0; w < s.width; ++w, in += s.samples) {
      V* pixel = channel + s.pad_width + w;
      for (int64_t b = 0; b < full; ++b) pixel[b * block_stride] = *reinterpret_cast<const U*>(in + b * L);
      if (rest > 0) {
        V last{};
        std::memcpy(&last, in + full * L, rest * sizeof(T));
        pixel[full * block_stride] = last;
      }
    }
  }
}

// Packs [C_out][C_in][9] as [block of kTileChannels][C_in][9][kTileChannels]; missing channels are zero.
template <class T>
void pack_weights(const ConvShape& s, const T* weight, T* packed) {
  for (int64_t o0 = 0; o0 < s.out_channels; o0 += kTileChannels)
    for (int64_t i = 0; i < s.in_channels * 9; ++i)
      for (int o = 0; o < kTileChannels; ++o)
        *packed++ = o0 + o < s.out_channels ? weight[(o0 + o) * s.in_channels * 9 + i] : T(0);
}

// Where a tile's results go.
struct Target {
  int64_t channel, pixel;  // strides
  int outputs;             // channels to write, at most kTileChannels
  int64_t lanes;           // samples to write
  bool bypass;             // every store is a full aligned vector and goes past the caches
};

// One register tile: kTileChannels outputs of `Pixels` neighbouring pixels, all lanes.
template <class T, int Pixels>
inline __attribute__((always_inline)) void tile(const T* const rows[3], int64_t channel_stride, int64_t in_channels,
                                                const T* packed, T* y, const Target& to) {
  using V = typename Lanes<T>::Vector;
  using U = typename Lanes<T>::Unaligned;
  constexpr int64_t L = Lanes<T>::count;
  V acc[kTileChannels][Pixels] = {};
  for (int64_t c = 0; c < in_channels; ++c) {
    for (int kh = 0; kh < 3; ++kh) {
      const V* row = reinterpret_cast<const V*>(rows[kh] + c * channel_stride);
      V in[Pixels + 2];
#pragma GCC unroll 8
      for (int i = 0; i < Pixels + 2; ++i) in[i] = row[i];
#pragma GCC unroll 3
      for (int kw = 0; kw < 3; ++kw)
#pragma GCC unroll 8
        for (int o = 0; o < kTileChannels; ++o) {
          const T w = packed[kw * kTileChannels + o];
#pragma GCC unroll 8
          for (int i = 0; i < Pixels; ++i) acc[o][i] += in[kw + i] * w;
        }
      packed += 3 * kTileChannels;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kTileChannels; ++o) {
    if (o >= to.outputs) break;
#pragma GCC unroll 8
    for (int i = 0; i < Pixels; ++i) {
      T* out = y + o * to.channel + i * to.pixel;
      if (to.bypass)
        stream(out, acc[o][i]);
      else if (to.lanes >= L)
        *reinterpret_cast<U*>(out) = acc[o][i];
      else
        std::memcpy(out, &acc[o][i], to.lanes * sizeof(T));
    }
  }
}

template <class T, int Pixels>
inline void tiles(const T* const rows[3], int64_t& w, int64_t end, int64_t channel_stride, int64_t in_channels,
                  const T* packed, T* y, const Target& to) {
  constexpr int64_t L = Lanes<T>::count;
  for (; w + Pixels <= end; w += Pixels) {
    const T* at[3] = {rows[0] + w * L, rows[1] + w * L, rows[2] + w * L};
    tile<T, Pixels>(at, channel_stride, in_channels, packed, y + w * to.pixel, to);
  }
}

// One output row of one branch and one chunk of samples, from three staged rows.
template <class T>
void output_row(const ConvShape& s, const Plan<T>& plan, const T* const staged[3], const T* packed, T* y,
                int64_t first_sample) {
  constexpr int64_t L = Lanes<T>::count;
  const int64_t channel_stride = plan.padded_width * L;
  Target to{s.out_height() * s.out_width() * s.samples, s.samples, 0, 0, false};
  const int64_t y_bytes = s.branches * s.out_channels * to.channel * int64_t(sizeof(T));
  to.bypass = y_bytes > kStreamBytes && s.samples % L == 0 && reinterpret_cast<uintptr_t>(y) % kVectorBytes == 0;
  for (int64_t o = 0; o < s.out_channels; o += kTileChannels) {
    to.outputs = s.out_channels - o < kTileChannels ? int(s.out_channels - o) : kTileChannels;
    const T* weights = packed + o * s.in_channels * 9;
    for (int64_t b = 0; b < plan.lane_blocks; ++b) {
      const int64_t sample = first_sample + b * L;
      to.lanes = s.samples - sample;
      if (to.lanes <= 0) break;
      const int64_t offset = b * s.in_channels * channel_stride;
      const T* rows[3] = {staged[0] + offset, staged[1] + offset, staged[2] + offset};
      T* out = y + o * to.channel + sample;
      int64_t w = 0;
      tiles<T, kTilePixels>(rows, w, s.out_width(), channel_stride, s.in_channels, weights, out, to);
      tiles<T, 1>(rows, w, s.out_width(), channel_stride, s.in_channels, weights, out, to);
    }
  }
}

template <class T>
int64_t rows(const ConvShape& s) {
  return s.branches * Plan<T>(s).chunks * s.out_height();
}

template <class T>
size_t scratch_size(const ConvShape& s) {
  const Plan<T> plan(s);
  return 3 * plan.row_size + plan.weight_size;
}

template <class T>
void run(const ConvShape& s, const T* x, const T* weight, T* y, T* scratch, int64_t begin, int64_t end) {
  const Plan<T> plan(s);
  const int64_t height = s.out_height(), x_branch = s.in_channels * s.height * s.width * s.samples;
  const int64_t y_branch = s.out_channels * height * s.out_width() * s.samples;
  T* packed = scratch + 3 * plan.row_size;
  int64_t staged_until = 0, group = -1, branch = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t h = unit % height, first_sample = unit / height % plan.chunks * plan.lane_blocks * Lanes<T>::count;
    if (unit / height != group) {
      group = unit / height;
      staged_until = h;  // nothing staged yet
    }
    if (group / plan.chunks != branch) {
      branch = group / plan.chunks;
      pack_weights(s, weight + branch * s.out_channels * s.in_channels * 9, packed);
    }
    const T* input = x + (s.shared_input ? 0 : branch * x_branch);
    for (; staged_until < h + 3; ++staged_until)
      stage_row(s, plan, input, staged_until - s.pad_height, first_sample, scratch + staged_until % 3 * plan.row_size);
    const T* staged[3];
    for (int kh = 0; kh < 3; ++kh) staged[kh] = scratch + (h + kh) % 3 * plan.row_size;
    output_row(s, plan, staged, packed, y + branch * y_branch + h * s.out_width() * s.samples, first_sample);
  }
#if BSFAST_X86
  _mm_sfence();  // streamed results are visible to whoever waits for this worker
#endif
}

}  // namespace

template <class T>
Conv3x3<T> conv3x3() {
  return {rows<T>, scratch_size<T>, run<T>};
}
template Conv3x3<float> conv3x3<float>();
template Conv3x3<double> conv3x3<double>();

}  // namespace BSFAST_ISA
}  // namespace bsfast
