"""The exact Hessian of the first layers of all branches on a GPU, and the same by hand on stock operators."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.contestants import OWN
from tests.benchmarks.hessian_contestants import HAND, MATRICES, Problem
from tests.benchmarks.network_case import CLASSES, NetworkCase
from tests.gpu.machine import Timer, add_rates, attempt, least_ms, summary
from tests.gpu.networks import least, memory, reset_memory

ROUNDS = 3
WAYS = tuple(name for name in MATRICES if name == OWN or HAND in name)
SAME = 1e-2  # float32: a ReLU that decides otherwise moves a column


def measure(case: NetworkCase, timer: Timer, peaks: dict[str, float]) -> dict[str, Any]:
    """Time all ways by the wall clock, one after the other, and compare them with the first, bsfast's.

    Args:
        case: The network, and how many samples the loss is over.
        timer: Of the device.
        peaks: Limits of the device.

    Returns:
        For each way its times, memory and rates; the least time for the passes and products that ways by hand make.
    """
    results: dict[str, Any] = {}
    truth: list[Tensor] = []
    for name in WAYS:

        def timed(name: str = name) -> dict[str, Any]:
            with torch.device(timer.device):
                compute = MATRICES[name](Problem(case))
            found = compute()  # the first call is not timed
            truth.append(found)
            difference = ((found - truth[0]).norm() / truth[0].norm()).item()
            before = reset_memory(timer.device)
            times = [wall_ms(compute, timer.device) for _ in range(ROUNDS)]
            return summary(times) | memory(timer.device, before) | {"difference": float(f"{difference:.1e}")}

        results[name] = timed() if name == OWN else attempt(timed)
    size = len(truth[0])
    gflop, moved, floor = least_by_hand(case, size, peaks)
    add_rates(results, gflop, moved, floor)
    ran = {name: values for name, values in results.items() if "error" not in values}
    for name, values in ran.items():
        if not values["difference"] <= SAME:
            raise ValueError(f"{name} must equal {OWN} to {SAME}, got {values['difference']:.1e}")
    best = min(((values["median_ms"], name) for name, values in ran.items() if name != OWN), default=(math.nan, "none"))
    return {
        "size": size,
        "gflop": round(gflop, 3),
        "mb": round(1e-6 * moved, 1),
        "floor_ms": float(f"{floor:.4g}"),
        "best_stock": best[1],
        "times_faster_than_best_stock": round(best[0] / ran[OWN]["median_ms"], 3),
        "results": results,
    }


def least_by_hand(case: NetworkCase, size: int, peaks: dict[str, float]) -> tuple[float, float, float]:
    """GFLOP, bytes and ms of the passes through the convolutions, and of one half of the product of what they give."""
    columns = CLASSES - 1  # of the loss's root: a backward pass each, after one forward pass
    layers = least(case, "forward", torch.float32, peaks)
    gflop, moved = 1e-9 * size * (size + 1) * columns * case.samples, 4.0 * size * (columns * case.samples + size)
    product = gflop, moved, least_ms(gflop, moved, torch.float32, peaks)
    gflop, moved, ms = ((1 + columns) * of_pass + own for of_pass, own in zip(layers, product, strict=True))
    return gflop, moved, ms


def wall_ms(compute: Callable[[], Tensor], device: str) -> float:
    """Time one call, the host's part included."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    compute()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
