// A CUDA device made current, with torch's current stream of it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/conv_matrix_plan.h"
#include "operands.h"

namespace bsfast::cuda {

inline void check_cuda(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA says ", cudaGetErrorString(error));
}

class CurrentDevice {
 public:
  CurrentDevice(const char* op, const Tensor& t) : op_(op), index_(t.get_device_index()), guard_(index_) {
    // This library has a CUDA runtime of its own, which learns of the device here; torch's guard puts both back.
    check_cuda(op, cudaSetDevice(index_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  MatrixUnits matrix_units() const {
    int major = 0, minor = 0;
    check_cuda(op_, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_));
    check_cuda(op_, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_));
    return matrix_units_of(10 * (10 * major + minor), {__CUDA_ARCH_LIST__});
  }

  template <class Argument>
  void operator()(void (*kernel)(Argument), const Grid& grid, const std::remove_const_t<Argument>& argument) const {
    kernel<<<grid.blocks, grid.threads, grid.shared_bytes, static_cast<cudaStream_t>(stream_)>>>(argument);
    check_cuda(op_, cudaGetLastError());
  }

 private:
  const char* op_;
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace bsfast::cuda
