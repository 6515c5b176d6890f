// The CUDA operators as operators of the CPU, on emulated blocks: all that Python calls, without a GPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "emulation/cuda.h"
// The emulation comes before device code.
#include "cuda/conv_ops.h"
#include "emulation/launch.h"

namespace {

struct EmulatedDevice : bsfast::emulation::Launcher {
  EmulatedDevice(const char*, const bsfast::Tensor&) : Launcher{bsfast::emulation::Order::random} {}
  bsfast::cuda::MatrixUnits matrix_units() const { return bsfast::cuda::MatrixUnits::sm_80; }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bsfast, CPU, library) {
  library.impl("conv2d_out", TORCH_BOX(&bsfast::cuda::conv2d_out<EmulatedDevice>));
  library.impl("conv2d_input_grad_out", TORCH_BOX(&bsfast::cuda::conv2d_input_grad_out<EmulatedDevice>));
  library.impl("conv2d_weight_grad_out", TORCH_BOX(&bsfast::cuda::conv2d_weight_grad_out<EmulatedDevice>));
  library.impl("conv2d_weight_grad_per_sample_out",
               TORCH_BOX(&bsfast::cuda::conv2d_weight_grad_per_sample_out<EmulatedDevice>));
}
