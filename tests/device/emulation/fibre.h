// Fibres: functions with a stack of their own that hand control back and forth with their caller.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__) || defined(BSFAST_UCONTEXT)
#include <ucontext.h>
#endif

namespace bsfast::emulation {

class Fibre {
 public:
  Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Makes `run` begin body(argument), which must never return. What ran before on this stack is forgotten.
  void start(void (*body)(void*), void* argument);
  void run();    // continues until it yields; from its caller
  void yield();  // back to the caller; from inside

 private:
  static constexpr size_t kStackBytes = 256 * 1024;
  static void enter(Fibre* self);

  std::unique_ptr<char[]> stack_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
#if defined(__x86_64__) && !defined(BSFAST_UCONTEXT)
  void* inside_ = nullptr;  // stack pointers of the side that waits
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
  // For the address sanitizer, which must know every stack.
  void* inside_frames_ = nullptr;
  void* outside_frames_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
};

}  // namespace bsfast::emulation
