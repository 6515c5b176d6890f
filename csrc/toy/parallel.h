// Runs the toy trainer on several threads. Compiled once, for the baseline: it uses the standard library.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "toy/trainer.h"

namespace bsfast {

// Each thread owns one scratch and takes trials from a shared counter, so the result does not depend on their number.
inline void train(const Toy& toy, Isa isa, int64_t num_threads) {
  struct Free {
    void operator()(double* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  const ToyTrainer trainer = toy_trainer(isa);
  const size_t bytes = trainer.scratch_size(toy) * sizeof(double);
  std::vector<std::unique_ptr<double[], Free>> scratch(std::max<int64_t>(1, std::min(num_threads, toy.trials)));
  for (auto& s : scratch) s.reset(static_cast<double*>(::operator new[](bytes, std::align_val_t(64))));
  int64_t next_trial = 0;
  std::vector<std::thread> threads;
  try {
    for (size_t i = 1; i < scratch.size(); ++i) threads.emplace_back(trainer.run, toy, &next_trial, scratch[i].get());
  } catch (const std::system_error&) {
    // The system grants no more threads: those that run do all the work.
  }
  trainer.run(toy, &next_trial, scratch[0].get());
  for (auto& thread : threads) thread.join();
}

}  // namespace bsfast
