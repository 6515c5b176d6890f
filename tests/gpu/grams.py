"""Products of all rows of matrices with each other on a GPU: the own kernel and stock products of both halves."""

from typing import Any

import torch

from bsfast import ops
from bsfast.ops.gram import launch
from tests.gpu.machine import Timer, add_rates, least_ms
from tests.tolerance import tolerance


def measure(count: int, rows: int, columns: int, timer: Timer, peaks: dict[str, float]) -> dict[str, Any]:
    """Check all ways against float64 and time them.

    Args:
        count: Number of matrices.
        rows: Of each.
        columns: Likewise.
        timer: Of the device.
        peaks: Limits of the device.

    Returns:
        Times, rates, and the least time that memory and arithmetic on one half allow.
    """
    x, weights = (
        torch.randn(count, rows, columns, device=timer.device),
        torch.randn(columns, device=timer.device).sign(),
    )
    works = {
        "bsfast": lambda: ops.gram(x, weights),
        "own kernel": lambda: launch(x, weights),
        "torch.bmm": lambda: torch.bmm(x * weights, x.mT),
    }
    if timer.device == "cpu":
        del works["own kernel"]
    truth = torch.bmm(x.double() * weights, x.mT.double())
    for name, work in works.items():
        error = (torch.linalg.vector_norm(work() - truth) / torch.linalg.vector_norm(truth)).item()
        if not error <= 4 * tolerance(torch.float32, columns):
            raise ValueError(f"{name} must equal the product in float64, got a relative error of {error:.1e}")
    gflop = 1e-9 * count * rows * (rows + 1) * columns
    moved = x.nbytes + weights.nbytes + 4 * count * rows**2
    floor = least_ms(gflop, moved, torch.float32, peaks)
    results = timer.run(works)
    add_rates(results, gflop, moved, floor)
    return {
        "gflop": round(gflop, 3),
        "mb": round(1e-6 * moved, 1),
        "floor_ms": round(floor, 4),
        "chosen": ops.plan_gram(x).algorithm,
        "results": results,
    }
