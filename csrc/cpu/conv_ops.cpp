// The convolution operators that bsfast/ops declares, on LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "conv_operands.h"
#include "cpu/conv_gather.h"
#include "cpu/conv_weight_grad.h"
#include "cpu/tensors.h"
#include "cpu/winograd.h"
#include "cpu/winograd_weight_grad.h"

namespace bsfast {
namespace {

template <class T, template <class> class Kernel, class Plan>
void run_gather(const char* op, const Kernel<T>& kernel, const Plan& plan, const GatherOperands<T>& operands) {
  torch::stable::parallel_for(0, kernel.units(plan), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate(op, kernel.scratch_bytes(plan));
    kernel.run(plan, operands, scratch.get(), begin, end);
  });
}

// Mean and variance [M, channels] from the moments of all slices, in a fixed order (Chan et al., 1979).
template <class T>
void merge_moments(const ConvShape& s, int64_t slices, const Moments* moments, T* mean, T* variance) {
  for (int64_t branch = 0; branch < s.branches; ++branch)
    for (int64_t group = 0; group < s.groups; ++group)
      for (int64_t o = 0; o < s.out_channels; ++o) {
        Moments all{0, 0, 0};
        for (int64_t repeat = 0; repeat < s.repeats; ++repeat)
          for (int64_t slice = 0; slice < slices; ++slice) {
            const int64_t unit = ((branch * s.repeats + repeat) * s.groups + group) * slices + slice;
            const Moments& next = moments[unit * s.out_channels + o];
            const double count = all.count + next.count, delta = next.mean - all.mean;
            all.square += next.square + delta * delta * all.count * next.count / count;
            all.mean += delta * next.count / count;
            all.count = count;
          }
        *mean++ = T(all.mean);
        *variance++ = T(all.square > 0 || all.square != all.square ? all.square / all.count : 0);
      }
}

template <class T, template <class> class Kernel, class Plan>
void run_described(const char* op, const Kernel<T>& kernel, const Plan& plan, GatherOperands<T> operands,
                   const Optional& mean, const Optional& variance) {
  const ConvShape& s = plan.shape;
  std::vector<Moments> moments;
  const int64_t slices = mean ? kernel.slices(plan) : 0;
  if (mean) {
    moments.resize(size_t(s.branches * s.repeats * s.groups * slices * s.out_channels));
    operands.after.moments = moments.data();
  }
  run_gather(op, kernel, plan, operands);
  if (mean) merge_moments(s, slices, moments.data(), result<T>(*mean), result<T>(*variance));
}

// By Winograd's tiles of so many outputs along each axis, or directly if there are none.
template <class T>
void run_convolution(const char* op, const ConvShape& s, bool transposed, int64_t tile,
                     const GatherOperands<T>& operands, const Optional& mean, const Optional& variance) {
  static const Gather<T> direct = gather<T>(chosen_isa(op));
  static const Winograd<T> tiled = winograd<T>(chosen_isa(op));
  if (tile > 0) return run_described(op, tiled, WinogradPlan(s, transposed, int(tile)), operands, mean, variance);
  run_described(op, direct, GatherPlan(s, transposed), operands, mean, variance);
}

template <class T, template <class> class Kernel, class Plan>
void run_weight_grad(const char* op, const Kernel<T>& kernel, const Plan& plan, const Tensor& x,
                     const Prologue<T>& before, const Tensor& grad, Tensor& out) {
  const T *in = data<T>(x), *g = data<T>(grad);
  T* sum = result<T>(out);
  const int64_t parts = kernel.parts(plan), numel = out.numel();
  if (parts == 0) {  // a sum over no samples
    std::memset(sum, 0, size_t(numel) * sizeof(T));
    return;
  }
  const Scratch partial = allocate(op, parts > 1 ? size_t(parts * numel) * sizeof(T) : 0);
  T* to = parts > 1 ? static_cast<T*>(partial.get()) : sum;
  torch::stable::parallel_for(0, kernel.units(plan), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate(op, kernel.scratch_bytes(plan));
    kernel.run(plan, in, before, g, to, scratch.get(), begin, end);
  });
  if (parts == 1) return;
  std::memcpy(sum, to, size_t(numel) * sizeof(T));
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < numel; ++i) sum[i] += to[part * numel + i];
}

// The samples are innermost in memory in both activations, or outermost in both; says which by moving them.
void choose_order(const char* op, ConvShape& s, const Tensor& a, const char* a_name, const Tensor& b,
                  const char* b_name) {
  if (a.is_contiguous() && b.is_contiguous()) {
    std::swap(s.repeats, s.samples);
    return;
  }
  check_batch_last(a, op, a_name);
  check_batch_last(b, op, b_name);
}

// Checks what is read beside a result: it has the result's shape, dtype and order in memory.
void check_beside(const char* op, const char* name, const Optional& other, const Tensor& out) {
  if (!other) return;
  check_size(op, name, *other, Ints(out.sizes().begin(), out.sizes().end()));
  check_kinds(op, *other, out, out);
  if (!other->is_contiguous() || !out.is_contiguous()) {
    check_batch_last(*other, op, name);
    check_batch_last(out, op, "out");
  }
}

void check_tile(const char* op, const ConvShape& s, int64_t tile) {
  if (tile == 0) return;
  STD_TORCH_CHECK(tile == 2 || tile == 4, op, ": winograd must be 0, 2 or 4, got ", tile);
  STD_TORCH_CHECK(winograd_supports(s), op,
                  ": winograd takes kernels of 3x3 taps with stride and dilation 1 and padding of at most 2, on "
                  "batch-last memory");
}

template <class T>
Prologue<T> prologue(const Optional& scale, const Optional& shift, bool rectify) {
  return {data_or_null<T>(scale), data_or_null<T>(shift), rectify};
}

void conv2d_out(const Tensor& x, const Tensor& weight, Tensor out, Ints stride, Ints padding, Ints dilation,
                int64_t groups, int64_t winograd, const Optional& scale, const Optional& shift, bool rectify,
                const Optional& out_scale, const Optional& bias, const Optional& residual, bool relu,
                const Optional& mask, const Optional& mean, const Optional& variance) {
  constexpr const char* op = "conv2d_out";
  check_weight(op, weight, "weight");
  ConvShape s = describe(op, x.sizes(), weight.sizes(), stride, padding, dilation, groups);
  check_size(op, "out", out, result_size(s));
  check_kinds(op, x, weight, out);
  check_prologue(op, s, x.scalar_type(), scale, shift);
  check_of_result(op, s, x.scalar_type(), out_scale, bias, mean, variance);
  check_beside(op, "residual", residual, out);
  check_beside(op, "mask", mask, out);
  if (out.numel() == 0) return;
  choose_order(op, s, x, "x", out, "out");
  check_tile(op, s, winograd);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> after{data_or_null<T>(out_scale), data_or_null<T>(bias), data_or_null<T>(residual), relu,
                            data_or_null<T>(mask)};
    run_convolution<T>(op, s, false, winograd,
                       {data<T>(x), data<T>(weight), result<T>(out), prologue<T>(scale, shift, rectify), after}, mean,
                       variance);
  };
  x.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
}

void conv2d_input_grad_out(const Tensor& grad, const Tensor& weight, Tensor out, Ints stride, Ints padding,
                           Ints dilation, int64_t groups, int64_t winograd, const Optional& residual,
                           const Optional& mask) {
  constexpr const char* op = "conv2d_input_grad_out";
  check_weight(op, weight, "weight");
  ConvShape s = describe(op, out.sizes(), weight.sizes(), stride, padding, dilation, groups);
  check_size(op, "grad", grad, result_size(s));
  check_kinds(op, grad, weight, out);
  check_beside(op, "residual", residual, out);
  check_beside(op, "mask", mask, out);
  if (out.numel() == 0) return;
  if (s.shared_input) {
    // Summed over branches: their channels are those of one branch, which batch-last memory holds side by side.
    STD_TORCH_CHECK(groups == 1, op, ": groups must be 1 for a shared input, got ", groups);
    check_batch_last(grad, op, "grad");
    check_batch_last(out, op, "out");
    s.out_channels *= s.branches;
    s.branches = 1;
    s.shared_input = false;
  } else {
    choose_order(op, s, grad, "grad", out, "out");
  }
  check_tile(op, s, winograd);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> after{nullptr, nullptr, data_or_null<T>(residual), false, data_or_null<T>(mask)};
    run_convolution<T>(op, s, true, winograd, {data<T>(grad), data<T>(weight), result<T>(out), {}, after}, {}, {});
  };
  grad.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
}

void conv2d_weight_grad_out(const Tensor& x, const Tensor& grad, Tensor out, Ints stride, Ints padding, Ints dilation,
                            int64_t groups, int64_t winograd, const Optional& scale, const Optional& shift,
                            bool rectify, bool patches) {
  constexpr const char* op = "conv2d_weight_grad_out";
  check_weight(op, out, "out");
  ConvShape s = describe(op, x.sizes(), out.sizes(), stride, padding, dilation, groups);
  check_size(op, "grad", grad, result_size(s));
  check_kinds(op, x, grad, out);
  check_prologue(op, s, x.scalar_type(), scale, shift);
  STD_TORCH_CHECK(!patches || s.dilation[1] == 1, op, ": patches need a dilation of 1 along the width, got ",
                  s.dilation[1]);
  STD_TORCH_CHECK(!patches || winograd == 0, op, ": patches and winograd exclude each other");
  if (out.numel() == 0) return;
  choose_order(op, s, x, "x", grad, "grad");
  check_tile(op, s, winograd);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    static const WeightGrad<T> direct = weight_grad<T>(chosen_isa(op));
    static const WeightGrad<T> patched = weight_grad_patches<T>(chosen_isa(op));
    static const WinogradWeightGrad<T> tiled = winograd_weight_grad<T>(chosen_isa(op));
    const Prologue<T> before = prologue<T>(scale, shift, rectify);
    if (winograd > 0) return run_weight_grad(op, tiled, WinogradWeightGradPlan(s, int(winograd)), x, before, grad, out);
    run_weight_grad(op, patches ? patched : direct, WeightGradPlan(s), x, before, grad, out);
  };
  x.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
}

}  // namespace
}  // namespace bsfast

STABLE_TORCH_LIBRARY_IMPL(bsfast, CPU, library) {
  library.impl("conv2d_out", TORCH_BOX(&bsfast::conv2d_out));
  library.impl("conv2d_input_grad_out", TORCH_BOX(&bsfast::conv2d_input_grad_out));
  library.impl("conv2d_weight_grad_out", TORCH_BOX(&bsfast::conv2d_weight_grad_out));
}
