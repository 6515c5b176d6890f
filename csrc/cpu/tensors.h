// What the operators of csrc/cpu share: pointers, scratch, and checks of the tensors they are given.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "isa.h"

namespace bsfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

inline Isa chosen_isa(const char* op) {
  const char* name = std::getenv("BSFAST_ISA");
  return isa_from_name(name ? name : "", std::string(op) + ": BSFAST_ISA");
}

using Scratch = std::unique_ptr<void, decltype(&std::free)>;

inline Scratch allocate(const char* op, size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  Scratch memory(std::aligned_alloc(64, bytes), &std::free);
  STD_TORCH_CHECK(memory != nullptr, op, ": no memory for ", bytes, " bytes of scratch");
  return memory;
}

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

inline void check_kinds(const char* op, const Tensor& a, const Tensor& b, const Tensor& c) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() == c.scalar_type(), op,
                  ": all tensors must have one dtype");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double, op,
                  ": dtype must be float32 or float64");
}

// Checks that a tensor has one number for each of `channels` channels of each branch.
inline void check_channels(const char* op, const char* name, const Tensor& t, int64_t branches, int64_t channels,
                           ScalarType dtype) {
  check_size(op, name, t, {branches, channels});
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == dtype, op, ": ", name,
                  " must be contiguous and have the activations' dtype");
}

}  // namespace bsfast
