"""Speed and memory of whole networks next to stock PyTorch and the hardware's limit.

``make bench`` measures the centre and what matters most around it, ``make bench-full`` all of it. Work: the sum over M
branches, forward (evaluation, without gradients) and a training step (forward, loss, backward, SGD with momentum),
float32. One variable at a time around M=16, N=128, widths 8, 16, 32, 32 of the paper's classifier, and a generator of
64-pixel images. Contestants have the same parameters, are checked to give the same outputs, and take turns for 3 to 20
rounds after one of warm-up; every case is measured under both settings of the allocator. The limit is the number of
multiplications and additions of convolutions and matrices over the peak of fused multiply-adds, which is measured
before and after. Memory is that of a process of its own for each contestant; ``measure.py`` says what it contains; of
the compiled loop it would be the compiler's. What would need over 8 GiB is skipped, and the record says so. On a
machine that other processes use, the test skips and records nothing.
"""

import os
import shutil

import pytest

from bsfast.ops.backend import native_why_not
from tests.benchmarks.contestants import CONTESTANTS, TILES
from tests.benchmarks.host import why_busy
from tests.benchmarks.network_case import PHASES, NetworkCase
from tests.benchmarks.network_record import MALLOCS, measure_apart, save, save_skipped, why_skipped

SECONDS = 12  # for the rounds of a case under one setting
WHY_NOT = native_why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")

CENTRE = NetworkCase()
NARROW_FIRST = CENTRE._replace(widths=(6, 12, 24, 48))
SINGLE = CENTRE._replace(samples=1)
GENERATOR = NetworkCase("generator", branches=9, samples=8, widths=(8, 16, 32))
AROUND = [SINGLE, *(CENTRE._replace(samples=N) for N in (8, 32))]
AROUND += [*(CENTRE._replace(branches=M) for M in (1, 2, 8, 32, 64, 256)), GENERATOR]
QUICK, FULL = pytest.mark.quick, pytest.mark.full

TIMES = [
    pytest.param(CENTRE, PHASES, False, marks=QUICK, id=f"{CENTRE.name}"),
    pytest.param(SINGLE, ("forward",), False, marks=QUICK, id=f"{SINGLE.name}-forward"),
    pytest.param(NARROW_FIRST, PHASES, False, id=NARROW_FIRST.name),
    pytest.param(CENTRE, PHASES, True, marks=FULL, id=f"{CENTRE.name}-compiled"),
    *(pytest.param(case, PHASES, False, marks=FULL, id=case.name) for case in AROUND),
]
MEMORIES = [
    pytest.param(CENTRE, id=CENTRE.name),
    *(pytest.param(case, marks=FULL, id=case.name) for case in [NARROW_FIRST, *AROUND]),
]


@pytest.mark.parametrize("malloc", MALLOCS)
@pytest.mark.parametrize(("case", "phases", "compiled"), TIMES)
def test_network_speed(benchmark, capsys, host, case, phases, compiled, malloc):
    from bsfast import _native

    phases = [phase for phase in phases if not skipped(case, phase)]
    if not phases:
        pytest.skip("needs too much memory")
    if busy := why_busy([_native.fma_peak(host["threads"])], _native.fma_peak(1), host["threads"]):
        pytest.skip(busy)
    order = {"phases": phases, "seconds": SECONDS, "compiled": compiled and has_compiler()}
    result = benchmark.pedantic(measure_apart, (malloc, case), {"measure": "time", **order}, rounds=1)
    if result["busy"]:
        pytest.skip(result["busy"])
    operations, times = case.operations(), result["times"]
    shared = {key: result[key] for key in ("peak_gflops", "difference", "difference_after_warm_up")}
    for phase in phases:
        gflop = round(1e-9 * operations[phase], 3)
        save(case, phase, malloc, result["host"], {"gflop": gflop, **shared, "results": times[phase]})
        with capsys.disabled():
            print(f"\n{case.name} {phase}, {malloc} malloc: floor {1e3 * gflop / max(shared['peak_gflops']):.1f} ms")  # noqa: T201
            for name, values in times[phase].items():
                print(f"  {name:24s} {values['median_ms']:9.2f} ms, {values['rounds']} rounds")  # noqa: T201


@pytest.mark.parametrize("malloc", MALLOCS)
@pytest.mark.parametrize("case", MEMORIES)
def test_network_memory(benchmark, capsys, case, malloc):
    if skipped(case, "memory"):
        pytest.skip("needs too much memory")

    def measure_all():
        return {name: measure_apart(malloc, case, measure="memory", name=name) for name in CONTESTANTS if name != TILES}

    results = benchmark.pedantic(measure_all, rounds=1)
    hosts = [result.pop("host") for result in results.values()]
    save(case, "memory", malloc, hosts[0], {"results": results})
    with capsys.disabled():
        print(f"\n{case.name} memory, {malloc} malloc")  # noqa: T201
        for name, values in results.items():
            print(f"  {name:24s} {values['peak_mib']:6d} MiB, {values['growth_mib']:6d} of them in the step")  # noqa: T201


def skipped(case: NetworkCase, work: str) -> bool:
    """Say whether a work is too large, and if so write it into the record."""
    reason = why_skipped(case, work)
    if reason:
        save_skipped(case, work, reason)
    return reason is not None


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None
