// The sizes of one convolution over M branches, in one struct that every kernel reads.
#pragma once

#include <cstdint>

namespace bsfast {

struct ConvShape {
  int64_t branches;      // M
  int64_t repeats;       // samples outside the channels in memory: 1 if batch-last, N if contiguous
  int64_t samples;       // samples inside the pixels in memory: N if batch-last, 1 if contiguous
  int64_t groups;        // groups inside a branch
  int64_t in_channels;   // C_in of one group
  int64_t out_channels;  // C_out of one group
  int64_t size[2];       // H, W of the input
  int64_t kernel[2];     // of the weights
  int64_t stride[2];
  int64_t padding[2];  // zeros on each side
  int64_t dilation[2];
  bool shared_input;  // one input for all branches

  int64_t out_size(int axis) const {  // 0 where the kernel is larger than the padded image
    const int64_t last = size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    return last < 0 ? 0 : last / stride[axis] + 1;
  }
  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t weights() const { return groups * out_channels * in_channels * taps(); }  // of one branch
};

}  // namespace bsfast
