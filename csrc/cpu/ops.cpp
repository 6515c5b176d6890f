// CPU implementations of the operators that bsfast/ops declares, on LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

#include "check.h"
#include "cpu/conv3x3.h"
#include "shape.h"

namespace bsfast {
namespace {

using torch::stable::Tensor;

template <class T>
void run_conv3x3(const ConvShape& shape, const Tensor& x, const Tensor& weight, Tensor& out) {
  const char* isa = std::getenv("BSFAST_ISA");
  static const Conv3x3<T> kernel = conv3x3<T>(isa_from_name(isa ? isa : "", "conv3x3: BSFAST_ISA"));
  const T* in = static_cast<const T*>(x.const_data_ptr());
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  T* y = static_cast<T*>(out.mutable_data_ptr());
  const size_t bytes = (kernel.scratch_size(shape) * sizeof(T) + 63) / 64 * 64;
  torch::stable::parallel_for(0, kernel.rows(shape), 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), &std::free);
    STD_TORCH_CHECK(scratch != nullptr, "conv3x3: no memory for ", bytes, " bytes of scratch");
    kernel.run(shape, in, w, y, static_cast<T*>(scratch.get()), begin, end);
  });
}

void conv3x3_out(const Tensor& x, const Tensor& weight, Tensor out, int64_t pad_height, int64_t pad_width) {
  constexpr const char* op = "conv3x3";
  check_batch_last(x, op, "x");
  check_batch_last(out, op, "out");
  STD_TORCH_CHECK(weight.dim() == 5 && weight.is_contiguous() && weight.size(3) == 3 && weight.size(4) == 3, op,
                  ": weight must be contiguous with shape (M, C_out, C_in, 3, 3), got ", to_string(weight.sizes()));
  STD_TORCH_CHECK(pad_height >= 0 && pad_width >= 0, op, ": padding must be at least 0, got ", pad_height, " and ",
                  pad_width);
  const int64_t d = x.dim();
  const ConvShape shape{weight.size(0), x.size(d - 4), weight.size(2), weight.size(1), x.size(d - 2),
                        x.size(d - 1),  pad_height,    pad_width,      d == 4};
  STD_TORCH_CHECK(x.size(d - 3) == shape.in_channels && (shape.shared_input || x.size(0) == shape.branches), op,
                  ": x must match weight ", to_string(weight.sizes()), " in branches and channels, got ",
                  to_string(x.sizes()));
  const std::array<int64_t, 5> wanted = {shape.branches, shape.samples, shape.out_channels, shape.out_height(),
                                         shape.out_width()};
  STD_TORCH_CHECK(out.dim() == 5 && std::equal(wanted.begin(), wanted.end(), out.sizes().begin()), op,
                  ": out must have shape ", to_string(wanted), ", got ", to_string(out.sizes()));
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type() && x.scalar_type() == out.scalar_type(), op,
                  ": x, weight and out must have one dtype");
  if (out.numel() == 0) return;
  if (x.scalar_type() == torch::headeronly::ScalarType::Float)
    run_conv3x3<float>(shape, x, weight, out);
  else if (x.scalar_type() == torch::headeronly::ScalarType::Double)
    run_conv3x3<double>(shape, x, weight, out);
  else
    STD_TORCH_CHECK(false, op, ": dtype must be float32 or float64");
}

}  // namespace
}  // namespace bsfast

STABLE_TORCH_LIBRARY_IMPL(bsfast, CPU, library) { library.impl("conv3x3", TORCH_BOX(&bsfast::conv3x3_out)); }
