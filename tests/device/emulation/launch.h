// Starts kernels in the emulation, as a plan's launcher.
#pragma once

#include <type_traits>

#include "cuda/conv_plan.h"
#include "emulation/block.h"

namespace bsfast::emulation {

struct Launcher {
  Order order;

  template <class Argument>
  void operator()(void (*kernel)(Argument), const cuda::Grid& grid,
                  const std::remove_const_t<Argument>& argument) const {
    run({{grid.blocks, 1, 1}, {grid.threads, 1, 1}, grid.shared_bytes, order, 11}, [&] { kernel(argument); });
  }
};

}  // namespace bsfast::emulation
