"""Speed of bsfast.toy next to batched torch on the same work; ``make bench`` prints the ratio.

Work: 1000 trials, at most 20,000 steps, a trial succeeds at a summed squared error below 1e-4. Both get the same random
starts. Batched torch (float32, all trials in one tensor) can stop only when every trial has succeeded, looked up every
1000 steps; bsfast works in float64 and lets each trial go when it is done. All CPUs of the process serve either.
The record has the median of bsfast's rounds and the one run of batched torch.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bsfast import toy
from experiments.common.atomic import write_atomically
from tests.benchmarks.host import why_busy

RECORD = Path(__file__).parent / "records" / "toy.json"
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
def test_train_speed(benchmark, capsys, host, num_branches):
    native, threads = pytest.importorskip("bsfast._native"), host["threads"]
    single, before = native.fma_peak(1), native.fma_peak(threads)
    result = benchmark(toy.train, X, Y, num_branches, TRIALS, LR, SLOPE, MAX_STEPS, tolerance=TOLERANCE)
    begin = time.perf_counter()
    success = train_batched_torch(num_branches, result.initial_weight, result.initial_bias)
    milliseconds = 1e3 * (time.perf_counter() - begin)
    assert abs(success.float().mean().item() - result.success.mean()) < 0.02
    if busy := why_busy([before, native.fma_peak(threads)], single, threads):
        pytest.skip(busy)
    own = 1e3 * benchmark.stats.stats.median
    save(host, num_branches, {"bsfast_ms": round(own, 3), "torch_ms": round(milliseconds)})
    with capsys.disabled():
        print(  # noqa: T201
            f"\nM={num_branches}: bsfast {own:.2f} ms, batched torch {milliseconds:.0f} ms, "
            f"ratio {milliseconds / own:.0f}"
        )


def save(host: dict[str, object], num_branches: int, times: dict[str, float]) -> None:
    """Put one M into the record; those measured on another host are dropped."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    kept = record["branches"] if record.get("host") == host else {}
    record = {"host": host, "trials": TRIALS, "branches": {**kept, str(num_branches): times}}
    RECORD.parent.mkdir(exist_ok=True)
    write_atomically(RECORD, (json.dumps(record, indent=1) + "\n").encode())
