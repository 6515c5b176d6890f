// The sizes of one convolution over M branches, in one struct that every kernel reads.
#pragma once

#include <cstdint>

namespace bsfast {

struct ConvShape {
  int64_t branches;      // M
  int64_t samples;       // N
  int64_t in_channels;   // C_in
  int64_t out_channels;  // C_out
  int64_t height;        // H of the input
  int64_t width;         // W of the input
  int64_t pad_height;    // zeros above and below
  int64_t pad_width;     // zeros left and right
  bool shared_input;     // one input for all branches

  int64_t out_height() const { return height + 2 * pad_height - 2; }  // 3x3, stride 1
  int64_t out_width() const { return width + 2 * pad_width - 2; }
};

}  // namespace bsfast
