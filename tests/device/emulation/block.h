// One block of CUDA threads on the CPU: each thread a fibre, run one after the other in a chosen order from one
// rendezvous to the next, so that a result which depends on the order shows a missing barrier.
#pragma once

#include <cstddef>
#include <functional>

namespace bsfast::emulation {

struct Index {
  unsigned x, y, z;
};

enum class Order { forward, reverse, random };

struct Launch {
  Index grid{1, 1, 1}, block{1, 1, 1};
  size_t shared_bytes = 0;
  Order order = Order::forward;  // of the threads, and of the blocks
  unsigned seed = 0;             // of a random order
};

// What device code asks about itself.
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
unsigned lane();

// The block's dynamic shared memory: exactly as many bytes as asked for, all bits set (NaN) when a block begins.
void* shared_memory();

// Waits for all threads of the block; `line` tells barriers apart.
void synchronize_block(const char* file, int line);

// Waits for the lanes in `mask` of this warp. The last to come calls together(arguments of all 32 lanes, mask), where
// lanes outside the mask have null; each lane finds its results in its own argument.
void synchronize_warp(unsigned mask, const char* file, int line, void* argument,
                      void (*together)(void* const* arguments, unsigned mask));

// Stops everything: run() throws std::runtime_error with this text.
[[noreturn]] void fail(const char* text);

// Runs the body in every thread of every block. Throws std::runtime_error if threads wait for one another in different
// places or for threads that have returned, or if device code fails, and std::invalid_argument for sizes that no device
// accepts.
void run(const Launch& launch, const std::function<void()>& body);

}  // namespace bsfast::emulation
