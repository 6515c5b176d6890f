#include "emulation/fibre.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(frames, stack, bytes)
#define __sanitizer_finish_switch_fiber(frames, stack, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes)
#endif

#if defined(__x86_64__) && !defined(BSFAST_UCONTEXT)
// Saves the registers that a call preserves, exchanges stacks and restores. ucontext would make a system call each
// time.
extern "C" void bsfast_switch_stack(void** save, void* load);
asm(R"(
.text
.globl bsfast_switch_stack
.hidden bsfast_switch_stack
.type bsfast_switch_stack, @function
bsfast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bsfast_switch_stack, .-bsfast_switch_stack
)");
#endif

namespace bsfast::emulation {

namespace {
Fibre* starting = nullptr;  // a new fibre finds itself here
}

Fibre::Fibre() : stack_(new char[kStackBytes]) {}

void Fibre::enter(Fibre* self) {
  __sanitizer_finish_switch_fiber(nullptr, &self->outside_stack_, &self->outside_bytes_);
  self->body_(self->argument_);
  __builtin_trap();
}

void Fibre::start(void (*body)(void*), void* argument) {
  ASAN_UNPOISON_MEMORY_REGION(stack_.get(), kStackBytes);
  body_ = body;
  argument_ = argument;
  inside_frames_ = nullptr;
#if defined(__x86_64__) && !defined(BSFAST_UCONTEXT)
  // Six registers and the return address; a function begins 8 bytes below a multiple of 16.
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) / 16 * 16);
  *--top = nullptr;
  void (*begin)() = [] { enter(starting); };
  *--top = reinterpret_cast<void*>(begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  inside_ = top;
#else
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_.get();
  inside_.uc_stack.ss_size = kStackBytes;
  inside_.uc_link = nullptr;
  makecontext(&inside_, [] { enter(starting); }, 0);
#endif
}

void Fibre::run() {
  starting = this;
  __sanitizer_start_switch_fiber(&outside_frames_, stack_.get(), kStackBytes);
#if defined(__x86_64__) && !defined(BSFAST_UCONTEXT)
  bsfast_switch_stack(&outside_, inside_);
#else
  swapcontext(&outside_, &inside_);
#endif
  __sanitizer_finish_switch_fiber(outside_frames_, nullptr, nullptr);
}

void Fibre::yield() {
  __sanitizer_start_switch_fiber(&inside_frames_, outside_stack_, outside_bytes_);
#if defined(__x86_64__) && !defined(BSFAST_UCONTEXT)
  bsfast_switch_stack(&inside_, outside_);
#else
  swapcontext(&inside_, &outside_);
#endif
  __sanitizer_finish_switch_fiber(inside_frames_, &outside_stack_, &outside_bytes_);
}

}  // namespace bsfast::emulation
