"""Speed of the own 3x3 kernel next to the hardware's limit and to stock convolutions of the same M branches.

Work: 3x3, stride 1, padding 1, float32, M=16 branches, N=128 samples, forward only. Every contestant gets its operands
in the memory order of its name, and a conversion is never timed. Contestants take turns, 20 times after 3 rounds of
warm-up; medians and quartiles are in the record, one file for each setting of the allocator (``make bench`` sets it so
that glibc keeps large blocks, plain pytest does not). All multiply-adds count, those with padding too. The limit is the
best of 20 runs of multiply-adds in registers, half before and half after; the best run of the kernel is compared to it.
On a machine that other processes use, the test skips and records nothing.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast import ops
from bsfast.ops.backend import native_why_not
from tests.cases import in_order
from tests.tolerance import assert_close

BRANCHES, SAMPLES, ROUNDS, WARM_UP = 16, 128, 20, 3
SIZES = [(8, 32), (16, 16), (32, 8), (32, 4)]  # channels in and out of a branch, height and width
QUIET = 0.8  # a measured peak below this part of the expected one means that other processes take the cores
RECORDS = Path(__file__).parent / "records"
WHY_NOT = native_why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")

Contestants = dict[str, Callable[[], object]]


def contestants(x: Tensor, weight: Tensor) -> Contestants:
    """The same convolution in seven ways."""
    x_own, w = in_order(x, "batch_last"), weight
    out = in_order(torch.empty(BRANCHES, SAMPLES, w.shape[1], *x.shape[3:]), "batch_last")
    x_last, w_last = in_order(x, "channels_last"), in_order(w, "channels_last")
    x_group, w_group = x.transpose(0, 1).flatten(1, 2).contiguous(), w.flatten(0, 1)
    x_group_last = x_group.contiguous(memory_format=torch.channels_last)
    w_group_last = w_group.contiguous(memory_format=torch.channels_last)

    def loop(x: Tensor, w: Tensor) -> list[Tensor]:
        return [F.conv2d(x_k, w_k, padding=1) for x_k, w_k in zip(x, w, strict=True)]

    return {
        "kernel": lambda: torch.ops.bsfast.conv3x3(x_own, w, out, 1, 1),
        "conv2d": lambda: ops.conv2d(x_own, w, padding=1),
        "loop": lambda: loop(x, w),
        "loop, channels_last": lambda: loop(x_last, w_last),
        "grouped": lambda: F.conv2d(x_group, w_group, padding=1, groups=BRANCHES),
        "grouped, channels_last": lambda: F.conv2d(x_group_last, w_group_last, padding=1, groups=BRANCHES),
        "torch.func.vmap": lambda: torch.func.vmap(lambda x, w: F.conv2d(x, w, padding=1))(x, w),
    }


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@pytest.mark.parametrize(("channels", "size"), SIZES, ids=[f"{c}ch-{s}x{s}" for c, s in SIZES])
def test_conv3x3_speed(benchmark, capsys, host, channels, size):
    from bsfast import _native

    x = torch.randn(BRANCHES, SAMPLES, channels, size, size)
    weight = torch.randn(BRANCHES, channels, channels, 3, 3)
    operations = 2 * 9 * BRANCHES * SAMPLES * channels**2 * size**2
    works = contestants(x, weight)
    assert_close(works["conv2d"](), torch.stack(works["loop"]()), 9 * channels)
    times: dict[str, list[float]] = {name: [] for name in works}
    single, peak = _native.fma_peak(1), _native.fma_peak(host["threads"])
    for turn in range(WARM_UP + ROUNDS):
        for name, work in works.items():
            elapsed = seconds(work)
            times[name] += [elapsed] if turn >= WARM_UP else []
    peaks = peak, _native.fma_peak(host["threads"])
    if min(peaks) < QUIET * max(*peaks, single * host["threads"]):
        pytest.skip(
            f"the machine is busy: {host['threads']} threads reached {min(peaks):.0f} GFLOP/s, one {single:.0f}"
        )
    peak = max(peaks)
    benchmark.pedantic(works["kernel"], rounds=ROUNDS, warmup_rounds=WARM_UP)
    results = {name: summary(values, operations) for name, values in times.items()}
    share = results["kernel"]["best_gflops"] / peak
    entry = {"channels": channels, "size": size, "peak_gflops": round(peak, 1), "share_of_peak": round(share, 3)}
    save(host, {**entry, "results": results})
    with capsys.disabled():
        print(f"\n{channels} channels, {size}x{size}: peak {peak:.0f} GFLOP/s, kernel {100 * share:.0f}%")  # noqa: T201
        for name, result in results.items():
            print(f"  {name:24s} {result['median_ms']:8.2f} ms  {result['median_gflops']:6.0f} GFLOP/s")  # noqa: T201


def summary(values: list[float], operations: float) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4)
    return {
        "median_ms": round(1e3 * median, 4),
        "quartiles_ms": [round(1e3 * first, 4), round(1e3 * third, 4)],
        "median_gflops": round(1e-9 * operations / median, 1),
        "best_gflops": round(1e-9 * operations / min(values), 1),
    }


def save(host: dict[str, object], entry: dict[str, object]) -> None:
    """Put one size into the record of this allocator setting; sizes measured on another host are dropped."""
    setting = "tuned" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default"
    path = RECORDS / f"conv3x3-{setting}-malloc.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = [size for size in old.get("sizes", []) if key(size) != key(entry)] if old.get("host") == host else []
    work = {"branches": BRANCHES, "samples": SAMPLES, "dtype": "float32", "rounds": ROUNDS, "warm_up": WARM_UP}
    record = {"host": host, "malloc": setting, "work": work, "sizes": sorted([*kept, entry], key=key)}
    RECORDS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def key(entry: dict[str, object]) -> tuple[int, int]:
    return int(str(entry["channels"])), -int(str(entry["size"]))
