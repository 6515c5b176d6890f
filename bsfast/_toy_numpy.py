"""The toy trainer in NumPy, for installations without native code; same functions as ``bsfast._native``."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def instruction_set() -> str:
    """Name the instruction set, as the native module does."""
    return "numpy"


def train_toy(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
    *,
    lr: float,
    slope: float,
    tolerance: float,
    max_steps: int,
    stride: int,
    isa: str,  # noqa: ARG001
    num_threads: int,  # noqa: ARG001
) -> dict[str, NDArray[Any]]:
    """Train all trials in step, dropping those that have stopped; arguments as the native function's."""
    trials, num_branches = weight.shape
    error, steps = np.empty(trials), np.empty(trials, np.int64)
    trajectory = np.empty((trials, max_steps // stride + 1 if stride else 0, num_branches, len(x)))
    final_weight, final_bias = np.empty_like(weight), np.empty_like(bias)
    running = np.arange(trials)
    with np.errstate(over="ignore", invalid="ignore"):  # a trial may diverge
        for step in range(max_steps + 1):
            z = weight[:, :, None] * x + bias[:, :, None]
            gain = np.where(z > 0, 1.0, slope)
            responses = gain * z
            residual = responses.sum(1) - y
            squares = (residual**2).sum(1)
            if stride and step % stride == 0:
                trajectory[running, step // stride] = responses
            stop = ~((squares >= tolerance) & np.isfinite(squares)) | (step == max_steps)
            if stop.any():
                done = running[stop]
                final_weight[done], final_bias[done] = weight[stop], bias[stop]
                error[done], steps[done] = squares[stop], step
                if stride:
                    trajectory[done, step // stride + 1 :] = responses[stop, None]
                running, weight, bias, gain, residual = (a[~stop] for a in (running, weight, bias, gain, residual))
            if not running.size:
                break
            move = lr * residual[:, None] * gain
            weight, bias = weight - (move * x).sum(2), bias - move.sum(2)
    return {"weight": final_weight, "bias": final_bias, "error": error, "steps": steps, "trajectory": trajectory}
