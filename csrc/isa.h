// Which instruction set to run on this host, and how one source is compiled for each.
#pragma once

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#define BSFAST_X86 1
#else
#define BSFAST_X86 0
#endif

namespace bsfast {

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#if BSFAST_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

// The instruction set named by a user (tests run all that the host has); an empty name means the best.
inline Isa isa_from_name(const std::string& name, const std::string& argument = "isa") {
  const Isa best = best_isa();
  if (name.empty()) return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (name == isa_name(isa) && isa <= best) return isa;
  throw std::invalid_argument(argument + " must be an instruction set of this host (baseline to " + isa_name(best) +
                              "), got " + name);
}

// Declares the kernel `name<T>()` of each instruction set, and `name<T>(isa)` that picks one.
#define BSFAST_KERNEL_OF(isa, Kernel, name) \
  namespace isa {                           \
  template <class T>                        \
  Kernel<T> name();                         \
  }
#if BSFAST_X86
#define BSFAST_KERNEL(Kernel, name)                   \
  BSFAST_KERNEL_OF(baseline, Kernel, name)            \
  BSFAST_KERNEL_OF(avx2, Kernel, name)                \
  BSFAST_KERNEL_OF(avx512, Kernel, name)              \
  template <class T>                                  \
  Kernel<T> name(Isa isa) {                           \
    if (isa == Isa::avx512) return avx512::name<T>(); \
    if (isa == Isa::avx2) return avx2::name<T>();     \
    return baseline::name<T>();                       \
  }
#else
#define BSFAST_KERNEL(Kernel, name)        \
  BSFAST_KERNEL_OF(baseline, Kernel, name) \
  template <class T>                       \
  Kernel<T> name(Isa) {                    \
    return baseline::name<T>();            \
  }
#endif

}  // namespace bsfast
