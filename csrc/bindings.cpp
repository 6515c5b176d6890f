// pybind11 module bsfast._native: what is not a tensor op. Never links torch.
#include <pybind11/pybind11.h>

#include "isa.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native code of bsfast that is not a tensor op: the toy trainer and facts about this host.";
  module.def(
      "instruction_set", [] { return bsfast::isa_name(bsfast::best_isa()); },
      "Name the instruction set that the kernels run with on this host: avx512, avx2 or baseline.");
}
