// Gradient descent on the toys: many independent trials of sum_k LeakyReLU(w_k x + b_k), one version per instruction
// set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace bsfast {

// One call of the trainer. Trials differ in their initial parameters only; every trial stops on its own.
struct Toy {
  int64_t trials, branches, samples, max_steps;
  double lr, slope;
  double tolerance;         // a trial stops when its error is below; negative: never
  const double *x, *y;      // [J]
  double *weight, *bias;    // [trials, M], initial values in, final values out
  double* error;            // [trials], sum of squares at the stop; not finite if the trial diverged
  int64_t* steps;           // [trials], updates done at the stop
  int64_t stride, records;  // every stride-th step is recorded; stride 0: none
  double* trajectory;       // [trials, records, M, J], responses; the last ones repeat after the stop
};

struct ToyTrainer {
  size_t (*scratch_size)(const Toy&);  // doubles that one worker needs, 64-byte aligned
  // Trains trials, taking the next one from the counter whenever a lane falls free, until none is left. Workers share
  // the counter, each has its own scratch.
  void (*run)(const Toy&, int64_t* next_trial, double* scratch);
};

#define BSFAST_DECLARE(isa) \
  namespace isa {           \
  ToyTrainer toy_trainer(); \
  }
BSFAST_DECLARE(baseline)
#if BSFAST_X86
BSFAST_DECLARE(avx2)
BSFAST_DECLARE(avx512)
#endif
#undef BSFAST_DECLARE

inline ToyTrainer toy_trainer(Isa isa) {
#if BSFAST_X86
  if (isa == Isa::avx512) return avx512::toy_trainer();
  if (isa == Isa::avx2) return avx2::toy_trainer();
#endif
  (void)isa;
  return baseline::toy_trainer();
}

}  // namespace bsfast
