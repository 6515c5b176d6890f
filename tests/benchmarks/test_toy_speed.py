"""Speed of bsfast.toy next to batched torch on the same work; ``make bench`` prints the ratio.

Work: 1000 trials, at most 20,000 steps, a trial succeeds at a summed squared error below 1e-4. Both get the same random
starts. Batched torch (float32, all trials in one tensor) can stop only when every trial has succeeded, looked up every
1000 steps; bsfast works in float64 and lets each trial go when it is done. All CPUs of the process serve either.
"""

import time

import numpy as np
import pytest
import torch

from bsfast import toy

X, Y = [-1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.5, 1.0]
TRIALS, LR, SLOPE, MAX_STEPS, TOLERANCE = 1000, 0.01, 0.01, 20000, 1e-4


def train_batched_torch(num_branches: int, weight: np.ndarray, bias: np.ndarray) -> torch.Tensor:
    """Which trials succeed, all of them stepped together."""
    x, y = torch.tensor(X), torch.tensor(Y)
    w, b = torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32)
    for step in range(MAX_STEPS + 1):
        z = w[:, :, None] * x + b[:, :, None]
        gain = torch.where(z > 0, 1.0, SLOPE)
        residual = (gain * z).sum(1) - y
        if step == MAX_STEPS or (step % 1000 == 0 and bool((residual.square().sum(1) < TOLERANCE).all())):
            break
        gradient = residual[:, None] * gain
        w, b = w - LR * (gradient * x).sum(2), b - LR * gradient.sum(2)
    return residual.square().sum(1) < TOLERANCE


@pytest.mark.parametrize("num_branches", [2, 10])
def test_train_speed(benchmark, capsys, num_branches):
    result = benchmark(toy.train, X, Y, num_branches, TRIALS, LR, SLOPE, MAX_STEPS, tolerance=TOLERANCE)
    begin = time.perf_counter()
    success = train_batched_torch(num_branches, result.initial_weight, result.initial_bias)
    seconds = time.perf_counter() - begin
    assert abs(success.float().mean().item() - result.success.mean()) < 0.02
    ratio = seconds / benchmark.stats.stats.median
    benchmark.extra_info |= {"torch_seconds": seconds, "ratio": ratio}
    with capsys.disabled():
        native = 1e3 * benchmark.stats.stats.median
        print(f"\nM={num_branches}: bsfast {native:.2f} ms, batched torch {1e3 * seconds:.0f} ms, ratio {ratio:.0f}")  # noqa: T201
