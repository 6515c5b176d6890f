// Registers the CUDA operators, and says for which devices this library is compiled.
#include <torch/csrc/stable/library.h>

#include "cuda/conv_ops.h"
#include "cuda/current_device.h"

#define BSFAST_TEXT(...) #__VA_ARGS__
#define BSFAST_EXPANDED(...) BSFAST_TEXT(__VA_ARGS__)

// "800,900" for sm_80 and sm_90; the last is there as PTX, too, which later devices compile.
extern "C" __attribute__((visibility("default"))) const char* bsfast_cuda_architectures() {
  return BSFAST_EXPANDED(__CUDA_ARCH_LIST__);
}

STABLE_TORCH_LIBRARY_IMPL(bsfast, CUDA, library) {
  using bsfast::cuda::CurrentDevice;
  library.impl("conv2d_out", TORCH_BOX(&bsfast::cuda::conv2d_out<CurrentDevice>));
  library.impl("conv2d_input_grad_out", TORCH_BOX(&bsfast::cuda::conv2d_input_grad_out<CurrentDevice>));
  library.impl("conv2d_weight_grad_out", TORCH_BOX(&bsfast::cuda::conv2d_weight_grad_out<CurrentDevice>));
  library.impl("conv2d_weight_grad_per_sample_out",
               TORCH_BOX(&bsfast::cuda::conv2d_weight_grad_per_sample_out<CurrentDevice>));
}
