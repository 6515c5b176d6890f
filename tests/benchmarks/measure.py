"""One measurement of a whole network, in a process of its own: ``python -m tests.benchmarks.measure '<JSON>'``.

The allocator's settings are read when a process starts, and a process remembers its largest memory, so each setting
and each measurement of memory needs a new one. The last line of the output is the result, as JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.contestants import COMPILED, CONTESTANTS, Contestant
from tests.benchmarks.host import describe_host, why_busy
from tests.benchmarks.network_case import NetworkCase

FEWEST, MOST = 3, 20  # rounds
SAME = 1e-4  # outputs may differ by this part of the largest
TRAINED_ALIKE = 1e-3  # after the warm-up's step, which makes rounding differences grow


def measure_time(
    case: NetworkCase, phases: Sequence[str], *, seconds: float, compiled: bool = False, rounds: int | None = None
) -> dict[str, Any]:
    """Time all contestants, taking turns, after a warm-up.

    Args:
        case: What to run.
        phases: Of ``"forward"`` and ``"step"``.
        seconds: No further round begins after this time, but for the first three.
        compiled: Whether the compiled loop takes part.
        rounds: Exactly so many instead.

    Returns:
        For each phase and contestant the times in ms; the FMA peak before and after, in GFLOP/s; the host.
    """
    from bsfast import _native

    names = [*CONTESTANTS, *([COMPILED] if compiled else [])]
    contestants = {name: Contestant(name, case) for name in names}
    difference = largest_difference(contestants)
    if not difference <= SAME:
        raise ValueError(f"measure_time: outputs of {case.name} must agree to {SAME}, got {difference:.1e}")
    threads = torch.get_num_threads()
    single, before = _native.fma_peak(1), _native.fma_peak(threads)
    times: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in names} for phase in phases}
    run_round(contestants, times, 0)
    trained = largest_difference(contestants) if "step" in phases else difference
    if not trained <= TRAINED_ALIKE:
        raise ValueError(f"measure_time: {case.name} must train alike to {TRAINED_ALIKE}, got {trained:.1e}")
    began = time.perf_counter()
    for turn in range(1, 1 + (rounds or MOST)):
        if rounds is None and turn > FEWEST and time.perf_counter() - began > seconds:
            break
        run_round(contestants, times, turn)
    peaks = [before, _native.fma_peak(threads)]
    return {
        "host": describe_host(),
        "busy": why_busy(peaks, single, threads),
        "peak_gflops": [round(peak, 1) for peak in peaks],
        "difference": float(f"{difference:.1e}"),
        "difference_after_warm_up": float(f"{trained:.1e}"),
        "times": {
            phase: {name: summary(values[1:]) for name, values in of_phase.items()} for phase, of_phase in times.items()
        },
    }


def run_round(contestants: dict[str, Contestant], times: dict[str, dict[str, list[float]]], turn: int) -> None:
    """Let everyone run each phase once; who begins changes from turn to turn."""
    names = list(contestants)
    first = turn % len(names)
    for phase, of_phase in times.items():
        for name in names[first:] + names[:first]:
            contestants[name].ready(phase)
            work = getattr(contestants[name], phase)
            began = time.perf_counter()
            work()
            of_phase[name].append(1e3 * (time.perf_counter() - began))


def largest_difference(contestants: dict[str, Contestant]) -> float:
    """Return the largest difference of outputs in evaluation mode, as a part of the loop's largest; NaN stays NaN."""

    def output(contestant: Contestant) -> Tensor:
        contestant.ready("forward")
        return contestant.forward()

    truth = output(contestants["loop"])
    differences = [(output(contestant) - truth).abs().max() for contestant in contestants.values()]
    return (torch.stack(differences).max() / truth.abs().max()).item()


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, to four digits."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    first, median, third = (float(f"{value:.4g}") for value in quartiles)
    return {"median_ms": median, "quartiles_ms": [first, third], "rounds": len(values)}


def measure_memory(case: NetworkCase, name: str) -> dict[str, Any]:
    """Measure the largest resident memory of two training steps of one contestant.

    Args:
        case: What to train.
        name: The contestant.

    Returns:
        ``peak_mib``, the whole process, the interpreter and torch included; and ``growth_mib``, how much of it came
        with the steps: the peak less what it was when the network, its gradients and the optimizer's state existed and
        a step of two samples had loaded all code. Growth is activations, their gradients and temporaries.
    """
    contestant = Contestant(name, case)
    contestant.ready("step")
    contestant.step(2)
    before = peak_mib()
    for _ in range(2):
        contestant.step()
    after = peak_mib()
    return {"host": describe_host(), "peak_mib": round(after), "growth_mib": round(after - before)}


def peak_mib() -> float:
    """Largest resident memory of this program; ``ru_maxrss`` would begin at that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measure = {"time": measure_time, "memory": measure_memory}[order.pop("measure")]
    case = NetworkCase(**order.pop("case"))
    sys.stdout.write(json.dumps(measure(case, **order)) + "\n")
