// What the operators of csrc/cpu share: scratch, and checks of the tensors they are given.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "isa.h"
#include "operands.h"

namespace bsfast {

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

inline void check_kinds(const char* op, const Tensor& a, const Tensor& b, const Tensor& c) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() == c.scalar_type(), op,
                  ": all tensors must have one dtype");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double, op,
                  ": dtype must be float32 or float64");
}

}  // namespace bsfast
