// Toy trainer with one trial a lane, written over the vector width and compiled per instruction set (BSFAST_ISA).
// Lanes never exchange numbers, so a trial's result does not depend on its lane, its neighbours or its thread. A lane
// whose trial has stopped takes the next trial at once, and a trial whose numbers repeat exactly jumps over the cycles
// that are left: the few trials that never converge hold up nothing else.
//
// With [z]+ = max(z, 0), LeakyReLU(z) = slope z + (1 - slope) [z]+, hence
//   f_j = slope (x_j sum_k w_k + sum_k b_k) + (1 - slope) sum_k [w_k x_j + b_k]+
// and the gradient of 1/2 sum_j (f_j - y_j)^2 splits alike: a part common to all branches, and a sum over z > 0.
#include "toy/trainer.h"

#include <cfloat>

namespace bsfast {
namespace BSFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(double);
// Steps between looks for a cycle; rounding ends most of the trials that never converge in one of a power-of-two
// length.
constexpr int64_t kPeriod = 512;

typedef double Vector __attribute__((vector_size(kVectorBytes), may_alias));
typedef int64_t Mask __attribute__((vector_size(kVectorBytes), may_alias));

inline Vector positive(Vector z, Vector value) { return z > 0 ? value : Vector{}; }

// The lanes of one worker. Trial -1 is an idle lane.
struct Worker {
  const Toy& toy;
  int64_t* next_trial;
  Vector* parameters;  // [M][2], weight then bias
  Vector* snapshot;    // [M][2], parameters at step taken[lane]
  Vector* residual;    // [J], f - y
  Vector error;
  Mask busy;
  int64_t trial[kLanes], start[kLanes], taken[kLanes];
  int64_t step, event;  // updates since the worker began, and the step of the next record, look for a cycle or time-out

  double& weight(int64_t k, int lane) { return reinterpret_cast<double*>(parameters + 2 * k)[lane]; }
  double& bias(int64_t k, int lane) { return reinterpret_cast<double*>(parameters + 2 * k + 1)[lane]; }

  // Gives the lane the next trial, or none.
  void load(int lane) {
    const int64_t t = __atomic_fetch_add(next_trial, 1, __ATOMIC_RELAXED);
    const bool found = t < toy.trials;
    for (int64_t k = 0; k < toy.branches; ++k) {
      weight(k, lane) = found ? toy.weight[t * toy.branches + k] : 0;
      bias(k, lane) = found ? toy.bias[t * toy.branches + k] : 0;
    }
    trial[lane] = found ? t : -1;
    start[lane] = step;
    busy[lane] = found ? -1 : 0;
  }

  // If the parameters are those of kPeriod steps ago, they will be so for ever: moves the start back by whole periods.
  void skip_cycles(int lane) {
    const int64_t age = step - start[lane];
    bool same = age > 0 && step - taken[lane] == kPeriod;
    for (int64_t i = 0; i < 2 * toy.branches; ++i) {
      const double now = reinterpret_cast<double*>(parameters + i)[lane];
      double& then = reinterpret_cast<double*>(snapshot + i)[lane];
      same = same && now == then;
      then = now;
    }
    taken[lane] = step;
    if (same) start[lane] -= (toy.max_steps - age) / kPeriod * kPeriod;
  }

  // Writes the responses of the lane's trial to its rows [begin, end) of the trajectory.
  void record(int lane, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      double* out = toy.trajectory + (trial[lane] * toy.records + row) * toy.branches * toy.samples;
      for (int64_t k = 0; k < toy.branches; ++k)
        for (int64_t j = 0; j < toy.samples; ++j) {
          const double z = weight(k, lane) * toy.x[j] + bias(k, lane);
          *out++ = z > 0 ? z : toy.slope * z;
        }
    }
  }

  // Records and retires what is due at this step; says whether some lane has a new trial.
  bool handle() {
    bool loaded = false;
    event = INT64_MAX;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t t = trial[lane];
      if (t < 0) continue;
      if (toy.stride == 0 && (step - start[lane]) % kPeriod == 0) skip_cycles(lane);
      const int64_t age = step - start[lane], period = toy.stride > 0 ? toy.stride : kPeriod, row = age / period;
      const double e = error[lane];
      const bool stop = age == toy.max_steps || !(e >= toy.tolerance && e <= DBL_MAX);
      if (toy.stride > 0 && age % period == 0) record(lane, row, row + 1);
      if (toy.stride > 0 && stop) record(lane, row + 1, toy.records);
      const int64_t due = (row + 1) * period;
      int64_t next = start[lane] + (due < toy.max_steps ? due : toy.max_steps);
      if (stop) {
        for (int64_t k = 0; k < toy.branches; ++k) {
          toy.weight[t * toy.branches + k] = weight(k, lane);
          toy.bias[t * toy.branches + k] = bias(k, lane);
        }
        toy.error[t] = e;
        toy.steps[t] = age;
        load(lane);
        loaded = loaded || trial[lane] >= 0;
        if (trial[lane] < 0) continue;
        next = step;
      }
      event = next < event ? next : event;
    }
    return loaded;
  }
};

// Residuals and errors of all lanes; says whether some busy lane has converged or diverged. Samples 0: as toy says.
template <int Samples>
inline bool forward(Worker& worker) {
  const Toy& toy = worker.toy;
  const int64_t samples = Samples ? Samples : toy.samples;
  Vector w_sum{}, b_sum{}, registers[Samples ? Samples : 1];
  Vector* f = Samples ? registers : worker.residual;
  for (int64_t j = 0; j < samples; ++j) f[j] = Vector{};
  for (int64_t k = 0; k < toy.branches; ++k) {
    const Vector w = worker.parameters[2 * k], b = worker.parameters[2 * k + 1];
    w_sum += w;
    b_sum += b;
    for (int64_t j = 0; j < samples; ++j) {
      const Vector z = w * toy.x[j] + b;
      f[j] += positive(z, z);
    }
  }
  Vector error{};
  for (int64_t j = 0; j < samples; ++j) {
    const Vector r = toy.slope * (w_sum * toy.x[j] + b_sum) + ((1 - toy.slope) * f[j] - toy.y[j]);
    error += r * r;
    worker.residual[j] = r;
  }
  worker.error = error;
  const Mask done = worker.busy & ~((error >= toy.tolerance) & (error <= DBL_MAX));
  int64_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= done[lane];
  return any != 0;
}

// One step of gradient descent on all lanes.
template <int Samples>
inline void update(Worker& worker) {
  const Toy& toy = worker.toy;
  const int64_t samples = Samples ? Samples : toy.samples;
  // Moves of weight and bias: the part common to all branches, and what each active sample adds.
  Vector w_common{}, b_common{}, registers[Samples ? 2 * Samples : 1];
  Vector* active = Samples ? registers : worker.residual + samples;
  for (int64_t j = 0; j < samples; ++j) {
    const Vector move = toy.lr * worker.residual[j];
    w_common += toy.slope * toy.x[j] * move;
    b_common += toy.slope * move;
    active[2 * j] = (1 - toy.slope) * toy.x[j] * move;
    active[2 * j + 1] = (1 - toy.slope) * move;
  }
  for (int64_t k = 0; k < toy.branches; ++k) {
    const Vector w = worker.parameters[2 * k], b = worker.parameters[2 * k + 1];
    Vector w_move = w_common, b_move = b_common;
    for (int64_t j = 0; j < samples; ++j) {
      const Vector z = w * toy.x[j] + b;
      w_move += positive(z, active[2 * j]);
      b_move += positive(z, active[2 * j + 1]);
    }
    worker.parameters[2 * k] = w - w_move;
    worker.parameters[2 * k + 1] = b - b_move;
  }
}

size_t scratch_size(const Toy& toy) { return kLanes * (4 * toy.branches + 3 * toy.samples); }

template <int Samples>
void run(const Toy& toy, int64_t* next_trial, double* scratch) {
  Vector* parameters = reinterpret_cast<Vector*>(scratch);
  Worker worker{
      toy, next_trial, parameters, parameters + 2 * toy.branches, parameters + 4 * toy.branches, {}, {}, {}, {},
      {},  0,          0};
  for (int lane = 0; lane < kLanes; ++lane) worker.load(lane);
  for (;;) {
    const bool done = forward<Samples>(worker);
    if (done || worker.step == worker.event) {
      // A new trial's residuals are not known yet; recomputing the others gives the same numbers.
      if (worker.handle()) continue;
      if (worker.event == INT64_MAX) return;
    }
    update<Samples>(worker);
    ++worker.step;
  }
}

void run_any(const Toy& toy, int64_t* next_trial, double* scratch) {
  // Both toys of the paper have four samples: their sums stay in registers.
  (toy.samples == 4 ? run<4> : run<0>)(toy, next_trial, scratch);
}

}  // namespace

ToyTrainer toy_trainer() { return {scratch_size, run_any}; }

}  // namespace BSFAST_ISA
}  // namespace bsfast
