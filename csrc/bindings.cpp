// pybind11 module bsfast._native: what is not a tensor op. Never links torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "cpu/fma_peak.h"
#include "isa.h"
#include "toy/parallel.h"

namespace {

namespace py = pybind11;
using Array = py::array_t<double, py::array::c_style>;

// Checks only what guards memory; bsfast.toy.train checks the rest and says it better.
py::dict train_toy(const Array& x, const Array& y, const Array& weight, const Array& bias, double lr, double slope,
                   double tolerance, int64_t max_steps, int64_t stride, const std::string& isa, int64_t num_threads) {
  if (x.ndim() != 1 || y.ndim() != 1 || x.shape(0) != y.shape(0))
    throw std::invalid_argument("train_toy: x and y must have one shape (J,)");
  if (weight.ndim() != 2 || bias.ndim() != 2 || weight.shape(0) != bias.shape(0) || weight.shape(1) != bias.shape(1))
    throw std::invalid_argument("train_toy: weight and bias must have one shape (trials, M)");
  if (max_steps < 0 || stride < 0) throw std::invalid_argument("train_toy: max_steps and stride must not be negative");
  const py::ssize_t trials = weight.shape(0), branches = weight.shape(1), samples = x.shape(0);
  const py::ssize_t records = stride > 0 ? max_steps / stride + 1 : 0;
  Array final_weight({trials, branches}), final_bias({trials, branches}), error(trials);
  Array trajectory({trials, records, branches, samples});
  py::array_t<int64_t> steps(trials);
  std::copy_n(weight.data(), weight.size(), final_weight.mutable_data());
  std::copy_n(bias.data(), bias.size(), final_bias.mutable_data());
  const bsfast::Toy toy = {trials,
                           branches,
                           samples,
                           max_steps,
                           lr,
                           slope,
                           tolerance,
                           x.data(),
                           y.data(),
                           final_weight.mutable_data(),
                           final_bias.mutable_data(),
                           error.mutable_data(),
                           steps.mutable_data(),
                           stride,
                           records,
                           trajectory.mutable_data()};
  const bsfast::Isa chosen = bsfast::isa_from_name(isa);
  {
    py::gil_scoped_release release;
    bsfast::train(toy, chosen, num_threads);
  }
  using py::literals::operator""_a;
  return py::dict("weight"_a = final_weight, "bias"_a = final_bias, "error"_a = error, "steps"_a = steps,
                  "trajectory"_a = trajectory);
}

// Best of ten runs of about a hundredth of a second on so many threads, in GFLOP/s.
double fma_peak(int64_t threads) {
  if (threads < 1) throw std::invalid_argument("fma_peak: threads must be at least 1, got " + std::to_string(threads));
  using Clock = std::chrono::steady_clock;
  constexpr int64_t iterations = 2'000'000;
  const bsfast::FmaBurst burst = bsfast::fma_burst(bsfast::best_isa());
  double best = 0;
  for (int repeat = 0; repeat < 10; ++repeat) {
    std::vector<std::thread> others;
    const auto start = Clock::now();
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(burst, iterations);
    const double operations = double(threads) * burst(iterations);
    for (auto& thread : others) thread.join();
    best = std::max(best, operations / std::chrono::duration<double, std::nano>(Clock::now() - start).count());
  }
  return best;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native code of bsfast that is not a tensor op: the toy trainer and facts about this host.";
  module.def(
      "instruction_set", [] { return bsfast::isa_name(bsfast::best_isa()); },
      "Name the instruction set that the kernels run with on this host: avx512, avx2 or baseline.");
  module.def("train_toy", &train_toy, py::arg("x"), py::arg("y"), py::arg("weight"), py::arg("bias"), py::kw_only(),
             py::arg("lr"), py::arg("slope"), py::arg("tolerance"), py::arg("max_steps"), py::arg("stride"),
             py::arg("isa"), py::arg("num_threads"), "Train many toys at once; see bsfast.toy.train, which checks.");
  module.def("fma_peak", &fma_peak, py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Measure the float32 multiply-add peak of this host on so many threads, in GFLOP/s.");
}
