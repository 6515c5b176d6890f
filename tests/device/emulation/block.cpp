#include "emulation/block.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/fibre.h"

namespace bsfast::emulation {
namespace {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of sm_90

enum class State { ready, at_barrier, in_warp, returned };

struct Thread {
  Fibre fibre;
  Index index{};
  State state = State::ready;
  const char* file = nullptr;  // where it waits
  int line = 0;
  unsigned mask = 0;
  void* argument = nullptr;
};

struct Block {
  Launch launch;
  Index index{};
  std::vector<std::unique_ptr<Thread>> threads;
  Thread* current = nullptr;
  unsigned current_number = 0;
  std::unique_ptr<char[]> shared;
  const std::function<void()>* body = nullptr;
  std::string failure;
};

Block block;

[[noreturn]] void wait_forever() {
  for (;;) block.current->fibre.yield();
}

std::string place(const Thread& thread, size_t number) {
  const std::string name = "thread " + std::to_string(number);
  if (thread.state == State::returned) return name + " has returned";
  return name + " waits for its " + (thread.state == State::at_barrier ? "block" : "warp") + " at " + thread.file +
         ":" + std::to_string(thread.line);
}

[[noreturn]] bool fail_waiting() {
  std::string text = "device code: all threads must meet at the same place, got ";
  const std::string first = place(*block.threads[0], 0);
  for (size_t i = 1; i < block.threads.size(); ++i) {
    const Thread &a = *block.threads[0], &b = *block.threads[i];
    if (b.state != a.state || b.line != a.line || b.mask != a.mask)
      throw std::runtime_error(text + first + ", " + place(b, i));
  }
  throw std::runtime_error(text + first + ", which never comes");
}

// Lets all go on if all of them wait at one barrier.
bool release_block() {
  const Thread& first = *block.threads[0];
  for (const auto& thread : block.threads)
    if (thread->state != State::at_barrier || thread->line != first.line || std::strcmp(thread->file, first.file) != 0)
      return false;
  for (const auto& thread : block.threads) thread->state = State::ready;
  return true;
}

bool all_returned() {
  return std::all_of(block.threads.begin(), block.threads.end(),
                     [](const auto& thread) { return thread->state == State::returned; });
}

// The block's threads by number, warp by warp.
std::vector<unsigned> order_of(size_t count, std::mt19937& random) {
  std::vector<unsigned> warps((count + kLanes - 1) / kLanes), order;
  std::iota(warps.begin(), warps.end(), 0u);
  if (block.launch.order == Order::reverse) std::reverse(warps.begin(), warps.end());
  if (block.launch.order == Order::random) std::shuffle(warps.begin(), warps.end(), random);
  for (unsigned warp : warps) {
    const auto begin = std::ptrdiff_t(order.size());
    for (unsigned i = warp * kLanes; i < std::min<size_t>((warp + 1) * kLanes, count); ++i) order.push_back(i);
    if (block.launch.order == Order::reverse) std::reverse(order.begin() + begin, order.end());
    if (block.launch.order == Order::random) std::shuffle(order.begin() + begin, order.end(), random);
  }
  return order;
}

// Each warp goes as far as it can before the next begins: side by side, they would hide that one may overtake another.
void run_to_barrier(const std::vector<unsigned>& order) {
  for (size_t first = 0, last = 0; first < order.size(); first = last) {
    while (last < order.size() && order[last] / kLanes == order[first] / kLanes) ++last;
    for (bool ran = true; ran;) {
      ran = false;
      for (size_t i = first; i < last; ++i) {
        Thread& thread = *block.threads[order[i]];
        if (thread.state != State::ready) continue;
        block.current = &thread;
        block.current_number = order[i];
        thread.fibre.run();
        if (!block.failure.empty()) throw std::runtime_error("device code: " + block.failure);
        ran = true;
      }
    }
  }
}

void run_block() {
  const size_t count = block.threads.size();
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = *block.threads[i];
    thread.state = State::ready;
    thread.fibre.start(
        [](void*) {
          (*block.body)();
          block.current->state = State::returned;
          block.current->line = block.current->mask = 0;
          wait_forever();
        },
        nullptr);
  }
  // Exact size: the address sanitizer sees an access beyond it.
  block.failure.clear();
  block.shared.reset(new char[block.launch.shared_bytes]);
  std::memset(block.shared.get(), 0xff, block.launch.shared_bytes);
  std::mt19937 random(block.launch.seed + block.index.x);
  do {
    run_to_barrier(order_of(count, random));
  } while (!all_returned() && (release_block() || fail_waiting()));
}

void check(bool ok, const char* what, size_t got) {
  if (!ok) throw std::invalid_argument("launch: " + std::string(what) + ", got " + std::to_string(got));
}

}  // namespace

Index thread_index() { return block.current->index; }
Index block_index() { return block.index; }
Index block_size() { return block.launch.block; }
Index grid_size() { return block.launch.grid; }
unsigned lane() { return block.current_number % kLanes; }
void* shared_memory() { return block.shared.get(); }

void fail(const char* text) {
  block.failure = std::string(text) + ", in thread " + std::to_string(block.current_number) + " of block " +
                  std::to_string(block.index.x);
  wait_forever();
}

void synchronize_block(const char* file, int line) {
  Thread& self = *block.current;
  self.state = State::at_barrier;
  self.file = file;
  self.line = line;
  self.mask = 0;
  self.fibre.yield();
}

void synchronize_warp(unsigned mask, const char* file, int line, void* argument,
                      void (*together)(void* const* arguments, unsigned mask)) {
  Thread& self = *block.current;
  self.state = State::in_warp;
  self.file = file;
  self.line = line;
  self.mask = mask;
  self.argument = argument;
  const size_t first = block.current_number / kLanes * kLanes;
  void* arguments[kLanes] = {};
  bool all = (mask >> lane() & 1) != 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Thread* other = first + i < block.threads.size() ? block.threads[first + i].get() : nullptr;
    all = all && other != nullptr && other->state == State::in_warp && other->mask == mask && other->line == line;
    if (all) arguments[i] = other->argument;
  }
  if (!all) return self.fibre.yield();
  together(arguments, mask);
  for (unsigned i = 0; i < kLanes; ++i)
    if (mask >> i & 1) block.threads[first + i]->state = State::ready;
  self.fibre.yield();  // who goes on first is the order's to say
}

void run(const Launch& launch, const std::function<void()>& body) {
  const size_t count = size_t(launch.block.x) * launch.block.y * launch.block.z;
  check(count >= 1 && count <= kMaxThreads, "a block must have 1 to 1024 threads", count);
  check(launch.shared_bytes <= kMaxSharedBytes, "shared memory must be at most 232448 bytes", launch.shared_bytes);
  check(launch.grid.x >= 1 && launch.grid.x <= 0x7fffffffu, "the grid must have 1 to 2147483647 blocks along x",
        launch.grid.x);
  check(launch.grid.y >= 1 && launch.grid.y <= 65535, "the grid must have 1 to 65535 blocks along y", launch.grid.y);
  check(launch.grid.z >= 1 && launch.grid.z <= 65535, "the grid must have 1 to 65535 blocks along z", launch.grid.z);
  block.launch = launch;
  block.body = &body;
  while (block.threads.size() < count) block.threads.push_back(std::make_unique<Thread>());
  block.threads.resize(count);
  for (unsigned i = 0; i < count; ++i)
    block.threads[i]->index = {i % launch.block.x, i / launch.block.x % launch.block.y,
                               i / launch.block.x / launch.block.y};
  std::vector<Index> blocks;
  for (unsigned z = 0; z < launch.grid.z; ++z)
    for (unsigned y = 0; y < launch.grid.y; ++y)
      for (unsigned x = 0; x < launch.grid.x; ++x) blocks.push_back({x, y, z});
  if (launch.order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (launch.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(launch.seed));
  for (const Index& index : blocks) {
    block.index = index;
    run_block();
  }
}

}  // namespace bsfast::emulation
