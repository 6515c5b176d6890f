// What the operators of every device are given: tensors, their pointers and sizes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"

namespace bsfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* result(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* data_or_null(const Optional& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

inline void check_size(const char* op, const char* name, const Tensor& t, const Ints& wanted) {
  STD_TORCH_CHECK(size_t(t.dim()) == wanted.size() && std::equal(wanted.begin(), wanted.end(), t.sizes().begin()), op,
                  ": ", name, " must have shape ", to_string(wanted), ", got ", to_string(t.sizes()));
}

// Checks that a tensor has one number for each of `channels` channels of each branch.
inline void check_channels(const char* op, const char* name, const Tensor& t, int64_t branches, int64_t channels,
                           ScalarType dtype) {
  check_size(op, name, t, {branches, channels});
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == dtype, op, ": ", name,
                  " must be contiguous and have the activations' dtype, or float32 where that has 16 bits");
}

}  // namespace bsfast
