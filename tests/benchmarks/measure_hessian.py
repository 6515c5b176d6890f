"""One measurement of Hessians, in a process of its own: ``python -m tests.benchmarks.measure_hessian '<JSON>'``.

The last line of the output is the result, as JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.hessian_contestants import (
    EIGENVALUES,
    MATRICES,
    PRODUCTS,
    SINGLE_COLUMNS,
    Problem,
    autograd_columns,
)
from tests.benchmarks.host import describe_host, why_busy
from tests.benchmarks.measure import peak_mib
from tests.benchmarks.network_case import NetworkCase

SAME = 1e-2  # float32: a ReLU that decides otherwise moves a column by up to 4e-3
CHECKED = 4  # columns
PAIRS = 5


def measure(case: NetworkCase, work: str, name: str, *, rounds: int = 3, check: bool = True) -> dict[str, Any]:
    """Time one contestant, after a first call that is not timed where it is short, and check it where asked.

    Args:
        case: A case of the classifier.
        work: ``"matrix"``, ``"columns"`` (some of its columns), ``"products"`` or ``"eigenvalues"``.
        name: The contestant.
        rounds: How often it is timed.
        check: Whether to compare with columns of double backward in float64; only of the matrix and its columns.

    Returns:
        Seconds of wall clock and of CPU (of a column, for ``"columns"``; with how many the matrix has), the relative
        error, the peak of the resident memory.
    """
    from bsfast import _native

    threads = torch.get_num_threads()
    single, before = _native.fma_peak(1), _native.fma_peak(threads)
    problem = Problem(case)
    compute = contestant(problem, work, name)
    if work != "eigenvalues":  # tens of products: the first is no different, and takes minutes
        compute()
    seconds, cpu = [], []
    for _ in range(rounds):
        wall, own = time.perf_counter(), time.process_time()
        result = compute()
        seconds.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - own)
    peak = peak_mib()  # before the check, which takes more
    entry: dict[str, Any] = {
        "host": describe_host(),
        "busy": why_busy([before, _native.fma_peak(threads)], single, threads),
        "median_s": rounded(statistics.median(seconds)),
        "least_s": rounded(min(seconds)),
        "cpu_s": rounded(min(cpu)),
        "rounds": rounds,
        "fma_peak_gflops": round(before),
        "peak_mib": round(peak),
    }
    if work == "columns":
        entry["columns"] = problem.size
    if check and work in {"matrix", "columns"}:
        entry["error"] = rounded(error(result[:, :CHECKED] if work == "matrix" else result, case))
    if work == "eigenvalues":
        entry["largest"] = [rounded(value) for value in result[:, 0].tolist()]
    return entry


def contestant(problem: Problem, work: str, name: str) -> Callable[[], Tensor]:
    """What is timed."""
    if work == "matrix":
        return MATRICES[name](problem)
    if work == "eigenvalues":
        return lambda: EIGENVALUES[name](problem, PAIRS)
    if work == "columns":
        multiply = SINGLE_COLUMNS[name](problem)
        units = torch.eye(problem.size)[:, :1]
        return lambda: multiply(units)
    size = sum(parameter.numel() for branch in problem.branches for parameter in branch.parameters())
    multiply, vector = PRODUCTS[name](problem), torch.randn(size, generator=torch.Generator().manual_seed(0))
    return lambda: multiply(vector)


def error(columns: Tensor, case: NetworkCase) -> float:
    """Relative distance of the first columns from those of double backward in float64."""
    problem = Problem(case, torch.float64)
    truth = autograd_columns(problem)(torch.eye(problem.size, dtype=torch.float64)[:, : columns.shape[1]])
    return ((columns.double() - truth).norm() / truth.norm()).item()


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sys.stdout.write(json.dumps(measure(NetworkCase(**order.pop("case")), **order)) + "\n")
