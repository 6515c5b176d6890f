// Which kernel instance computes a convolution or one of its gradients, and with what grid: host code, without CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda/conv_gather.cuh"
#include "cuda/conv_weight_grad.cuh"
#include "shape.h"

namespace bsfast::cuda {

// What a launcher is called with besides the kernel and its argument.
struct Grid {
  unsigned blocks;
  unsigned threads;
  unsigned shared_bytes;
};

// Throws unless value < 2^31: the numbers that kernels keep in 32 bits. Whole tensors may be larger.
inline int narrow(const char* what, int64_t value) {
  if (value >= 0 && value < int64_t(1) << 31) return int(value);
  throw std::invalid_argument("conv2d: " + std::string(what) + " must be below 2^31 on CUDA, got " +
                              std::to_string(value));
}

// Whether vectors of so many bytes lie at all addresses, which views of larger tensors need not.
inline bool aligned(size_t bytes, std::initializer_list<const void*> addresses) {
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) return false;
  return true;
}

// Whether vectors of so many bytes lie at the operands, and at what is read beside the target.
template <class T>
bool aligned(size_t bytes, const GatherArguments<T>& a) {
  return aligned(bytes, {a.source, a.target, a.epilogue.residual, a.epilogue.mask});
}

// Throws unless offsets within a channel, and within the weights of a group, fit 32 bits.
inline void check_channel(const ConvShape& s) {
  narrow("elements of one channel", (s.size[0] + 2 * s.padding[0]) * (s.size[1] + 2 * s.padding[1]) * s.samples);
  narrow("taps of one weight", s.in_channels * s.out_channels * s.taps());
}

inline Axis axis_of(const ConvShape& s, bool transposed, int i) {
  const int64_t in = s.size[i], out = s.out_size(i);
  narrow("the padded image", in + 2 * s.padding[i] + s.dilation[i] * s.kernel[i] + s.stride[i]);
  return {int(transposed ? out : in), int(transposed ? in : out), int(s.kernel[i]), int(s.stride[i]),
          int(s.padding[i]),          int(s.dilation[i]),         transposed};
}

inline Range range_of(const ConvShape& s, int i) {
  const Axis axis = axis_of(s, false, i);
  return {axis.source, axis.target, axis.kernel, axis.stride, axis.padding, axis.dilation};
}

// A sum over branches is one over the channels of a single branch, which batch-last memory holds side by side.
inline ConvShape fold_shared_input(ConvShape s) {
  if (!s.shared_input) return s;
  if (s.groups != 1)
    throw std::invalid_argument("conv2d: groups must be 1 for the gradient of a shared input, got " +
                                std::to_string(s.groups));
  s.out_channels *= s.branches;
  s.branches = 1;
  s.shared_input = false;
  return s;
}

template <class T, class Tile>
int gather_parts(const GatherArguments<T>& a) {
  const auto tiles = [](const Axis& axis, int size) { return (int64_t(axis.targets(0)) + size - 1) / size; };
  const int64_t units = tiles(a.rows, Tile::Height) * tiles(a.columns, Tile::Width) * (a.samples / Tile::Samples);
  return int((narrow("the rectangles of one channel", units + kThreads) - 1) / kThreads);
}

// Calls use(tile) with the tile that fits the shape. A thread takes two samples at once where N is even, which halves
// the loads and their addresses.
template <class T, class Use>
void choose_gather_tile(const GatherArguments<T>& a, Use use) {
  const auto dense = [](const Axis& axis) { return axis.kernel == 3 && axis.stride == 1 && axis.dilation == 1; };
  // Six target channels at a time where that leaves fewer idle.
  const bool six = (a.targets + 5) / 6 * 6 < (a.targets + 7) / 8 * 8;
  if (a.samples % 2 != 0 || !aligned(2 * sizeof(T), a)) return use(GatherTile<1, 4, 8, 1, 1>{});
  if (dense(a.rows) && dense(a.columns))
    return six ? use(GatherTile<2, 2, 6, 2, 3>{}) : use(GatherTile<2, 2, 8, 2, 3>{});
  return six ? use(GatherTile<1, 4, 6, 2, 1>{}) : use(GatherTile<1, 4, 8, 2, 1>{});
}

// Convolution, or with `transposed` its input gradient, whose source is the output's gradient; pointers as in
// GatherArguments. launch(kernel, grid, arguments) starts a kernel.
template <class T>
GatherArguments<T> gather_arguments(ConvShape s, bool transposed, const T* source, const T* weight, T* target,
                                    const Normalise& normalise = {}, const Epilogue<T>& epilogue = {}) {
  if (transposed) s = fold_shared_input(s);
  GatherArguments<T> a{};
  a.source = source;
  a.weight = weight;
  a.target = target;
  a.normalise = normalise;
  a.epilogue = epilogue;
  a.rows = axis_of(s, transposed, 0);
  a.columns = axis_of(s, transposed, 1);
  a.groups = narrow("groups", s.groups);
  a.sources = narrow("channels", transposed ? s.out_channels : s.in_channels);
  a.targets = narrow("channels", transposed ? s.in_channels : s.out_channels);
  a.samples = narrow("the number of samples", s.samples);
  a.shared_source = s.shared_input;
  check_channel(s);
  choose_gather_tile(a, [&](auto tile) { a.parts = gather_parts<T, decltype(tile)>(a); });
  return a;
}

template <class T, class Tile>
unsigned gather_blocks(const ConvShape& shape, const GatherArguments<T>& a) {
  const int64_t branches = shape.shared_input && a.rows.transposed ? 1 : shape.branches;
  const int64_t channel_tiles = (a.targets + Tile::Channels - 1) / Tile::Channels;
  return unsigned(
      narrow("the grid", branches * a.groups * a.rows.classes() * a.columns.classes() * a.parts * channel_tiles));
}

template <class T, class Launch>
void conv_gather(const ConvShape& shape, const GatherArguments<T>& a, const Launch& launch) {
  choose_gather_tile(a, [&](auto tile) {
    using Tile = decltype(tile);
    const unsigned blocks = gather_blocks<T, Tile>(shape, a);
    if (blocks == 0) return;
    launch(&bsfast::conv_gather<T, Tile>,
           Grid{blocks, unsigned(kThreads), unsigned(Tile::SharedFloats * sizeof(float))}, a);
  });
}

constexpr int64_t kEnoughBlocks = 1024;        // for the largest device; a constant, so that all devices add up alike
constexpr int64_t kLeastUnits = 8 * kThreads;  // of a part: else the reduction costs more than the products

template <class T, class Use>
void choose_weight_grad_tile(const WeightGradArguments<T>& a, Use use) {
  const bool six = (a.out_channels + 5) / 6 * 6 < (a.out_channels + 7) / 8 * 8;
  if (a.samples % 2 != 0 || !aligned(2 * sizeof(T), {a.x, a.grad})) return use(WeightGradTile<8, 8, 1>{});
  return six ? use(WeightGradTile<6, 8, 2>{}) : use(WeightGradTile<8, 8, 2>{});
}

// Blocks of one part.
template <class T, class Tile>
int64_t weight_grad_blocks(const WeightGradArguments<T>& a) {
  const auto tiles = [](int64_t count, int size) { return (count + size - 1) / size; };
  return int64_t(a.branches) * a.groups * tiles(a.out_channels, Tile::Channels) *
         tiles(int64_t(a.in_channels) * a.rows.kernel * a.columns.kernel, Tile::Rows);
}

// The caller sets `partial` to memory for parts * weights floats.
template <class T>
WeightGradArguments<T> weight_grad_arguments(const ConvShape& s, const T* x, const T* grad,
                                             const Normalise& normalise = {}) {
  WeightGradArguments<T> a{};
  a.x = x;
  a.grad = grad;
  a.normalise = normalise;
  a.rows = range_of(s, 0);
  a.columns = range_of(s, 1);
  a.branches = narrow("branches", s.branches);
  a.groups = narrow("groups", s.groups);
  a.in_channels = narrow("channels", s.in_channels);
  a.out_channels = narrow("channels", s.out_channels);
  a.samples = narrow("the number of samples", s.samples);
  a.shared_input = s.shared_input;
  check_channel(s);
  choose_weight_grad_tile(a, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t blocks = weight_grad_blocks<T, Tile>(a),
                  units = s.out_size(0) * s.out_size(1) * s.samples / Tile::Samples;
    const int64_t wanted = blocks == 0 ? 1 : (kEnoughBlocks + blocks - 1) / blocks, most = units / kLeastUnits;
    a.parts = int(wanted < most ? wanted : most > 1 ? most : 1);
  });
  return a;
}

template <class T, class Launch>
void sum_parts(const ConvShape& shape, const WeightGradArguments<T>& a, T* result, const Launch& launch) {
  const int64_t count = shape.branches * shape.weights();
  launch(&bsfast::sum_parts<T>,
         Grid{unsigned(narrow("the grid", (count + kThreads - 1) / kThreads)), unsigned(kThreads), 0},
         SumPartsArguments<T>{a.partial, result, count, a.parts});
}

// Writes the weight gradient, [M, groups * C_out, C_in, kH, kW].
template <class T, class Launch>
void conv_weight_grad(const ConvShape& shape, const WeightGradArguments<T>& a, T* result, const Launch& launch) {
  if (shape.branches * shape.weights() == 0) return;
  choose_weight_grad_tile(a, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t blocks = weight_grad_blocks<T, Tile>(a) * a.parts;
    launch(&bsfast::conv_weight_grad<T, Tile>,
           Grid{unsigned(narrow("the grid", blocks)), unsigned(kThreads), unsigned(Tile::SharedBytes)}, a);
  });
  sum_parts(shape, a, result, launch);
}

}  // namespace bsfast::cuda
