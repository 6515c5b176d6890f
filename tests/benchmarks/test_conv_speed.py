"""Speed of the own convolution kernels next to the hardware's limit and to stock convolutions of the same M branches.

Work: convolution, input gradient and weight gradient; 3x3 with padding 1, also at stride 2, and 1x1 at stride 2;
float32, M=16 branches, N=128 samples. Every contestant gets its operands in the memory order of its name, and a
conversion is never timed. Contestants take turns, 20 times after 3 rounds of warm-up; medians and quartiles are in the
record, one file for each setting of the allocator (``make bench`` sets it so that glibc keeps large blocks, plain
pytest does not). All multiply-adds count, those with padding too. The limit is the best of 20 runs of multiply-adds in
registers, half before and half after; the best run of the direct kernel is compared to it. On a machine that other
processes use, the test skips and records nothing.
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
from tests.benchmarks.host import why_busy
from tests.cases import TRIPLE, ConvCase, in_order
from tests.tolerance import assert_close

BRANCHES, SAMPLES, ROUNDS, WARM_UP = 16, 128, 20, 3
RECORDS = Path(__file__).parent / "records"
WHY_NOT = native_why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")

Contestants = dict[str, Callable[[], Tensor | list[Tensor]]]


def case_of(channels: int, out_channels: int, size: int, kernel: int = 3, stride: int = 1) -> ConvCase:
    """Square in everything, with the padding that keeps the image's size at stride 1."""
    pairs = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (kernel // 2,) * 2}
    return ConvCase(BRANCHES, SAMPLES, channels, out_channels, (size, size), **pairs)


SIZES = [case_of(8, 8, 32), case_of(16, 16, 16), case_of(32, 32, 8), case_of(32, 32, 4)]
STRIDED = [case_of(8, 16, 32, stride=2), case_of(8, 16, 32, kernel=1, stride=2)]
WORKS = [(name, case) for name in TRIPLE for case in SIZES + (STRIDED if name == "conv2d" else [])]


def contestants(name: str, case: ConvCase) -> Contestants:
    """The same work in several ways; of a gradient, stock PyTorch is asked for that one only."""
    x, weight, grad = case.x(torch.float32), case.weight(torch.float32), case.grad(torch.float32)
    geometry, loop_geometry = tuple(case.geometry.values()), (case.stride, case.padding, case.dilation)

    def stock(x: Tensor, weight: Tensor, grad: Tensor, groups: int) -> Tensor:
        if name == "conv2d":
            return F.conv2d(x, weight, None, *loop_geometry, groups)
        mask = (name == "conv2d_input_grad", name == "conv2d_weight_grad", False)
        backward = torch.ops.aten.convolution_backward
        return backward(grad, x, weight, None, *loop_geometry, False, (0, 0), groups, mask)[mask.index(True)]

    def loop(*operands: Tensor) -> list[Tensor]:
        return [stock(*of_branch, groups=1) for of_branch in zip(*operands, strict=True)]

    def grouped(t: Tensor) -> Tensor:
        return t.transpose(0, 1).flatten(1, 2).contiguous()

    own_x, own_grad = in_order(x, "batch_last"), in_order(grad, "batch_last")
    own = {"conv2d": (own_x, weight), "conv2d_input_grad": (own_grad, weight), "conv2d_weight_grad": (own_x, own_grad)}
    a, b = own[name]
    sizes = {"conv2d": (), "conv2d_input_grad": (case.x_shape,), "conv2d_weight_grad": (case.kernel,)}[name]
    kernel, function = getattr(torch.ops.bsfast, f"{name}_out"), getattr(ops, name)
    out = torch.empty_like({"conv2d": own_grad, "conv2d_input_grad": own_x, "conv2d_weight_grad": weight}[name])
    last = [in_order(t, "channels_last") for t in (x, weight, grad)]
    merged = [grouped(x), weight.flatten(0, 1), grouped(grad)]
    merged_last = [t.contiguous(memory_format=torch.channels_last) for t in merged]
    works: Contestants = {
        "kernel": lambda: kernel(a, b, out, *geometry),
        name: lambda: function(a, b, *sizes, **case.geometry),
        "loop": lambda: loop(x, weight, grad),
        "loop, channels_last": lambda: loop(*last),
        "grouped": lambda: stock(*merged, groups=BRANCHES),
        "grouped, channels_last": lambda: stock(*merged_last, groups=BRANCHES),
    }
    if case.kernel == (3, 3) and case.stride == (1, 1):
        works["kernel, 2x2 tiles"] = lambda: kernel(a, b, out, *geometry, winograd=2)
        works["kernel, 4x4 tiles"] = lambda: kernel(a, b, out, *geometry, winograd=4)
    if name == "conv2d":
        vmapped = torch.func.vmap(lambda x, weight: F.conv2d(x, weight, None, *loop_geometry))
        works["torch.func.vmap"] = lambda: vmapped(x, weight)
    return works


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@pytest.mark.parametrize(("name", "case"), WORKS, ids=[f"{name}-{case}" for name, case in WORKS])
def test_conv_speed(benchmark, capsys, host, name, case):
    from bsfast import _native

    _, _, out_channels, height, width = case.out_shape
    products = BRANCHES * SAMPLES * out_channels * height * width * case.in_channels * case.kernel[0] * case.kernel[1]
    works = contestants(name, case)
    assert_close(works[name](), torch.stack(works["loop"]()), case.sum_length)
    times: dict[str, list[float]] = {contestant: [] for contestant in works}
    single, peak = _native.fma_peak(1), _native.fma_peak(host["threads"])
    for turn in range(WARM_UP + ROUNDS):
        for contestant, work in works.items():
            elapsed = seconds(work)
            times[contestant] += [elapsed] if turn >= WARM_UP else []
    peaks = peak, _native.fma_peak(host["threads"])
    if busy := why_busy(peaks, single, host["threads"]):
        pytest.skip(busy)
    peak = max(peaks)
    benchmark.pedantic(works["kernel"], rounds=ROUNDS, warmup_rounds=WARM_UP)
    results = {contestant: summary(values, 2 * products) for contestant, values in times.items()}
    share = results["kernel"]["best_gflops"] / peak
    settings = {"kernel": case.kernel[0], "stride": case.stride[0]}
    entry = {"operator": name, "channels": case.in_channels, "out_channels": out_channels, "size": case.size[0]}
    measured = {"peak_gflops": round(peak, 1), "share_of_peak": round(share, 3), "results": results}
    save(host, {**entry, **settings, **measured})
    with capsys.disabled():
        print(f"\n{name} {case}: peak {peak:.0f} GFLOP/s, kernel {100 * share:.0f}%")  # noqa: T201
        for contestant, result in results.items():
            print(f"  {contestant:24s} {result['median_ms']:8.2f} ms  {result['median_gflops']:6.0f} GFLOP/s")  # noqa: T201


def summary(values: list[float], operations: float) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4)
    return {
        "median_ms": round(1e3 * median, 4),
        "quartiles_ms": [round(1e3 * first, 4), round(1e3 * third, 4)],
        "median_gflops": round(1e-9 * operations / median, 1),
        "best_gflops": round(1e-9 * operations / min(values), 1),
    }


def save(host: dict[str, object], entry: dict[str, object]) -> None:
    """Put one work into the record of this allocator setting; works measured on another host are dropped."""
    setting = "tuned" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default"
    path = RECORDS / f"conv-{setting}-malloc.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = [size for size in old.get("sizes", []) if key(size) != key(entry)] if old.get("host") == host else []
    work = {"branches": BRANCHES, "samples": SAMPLES, "dtype": "float32", "rounds": ROUNDS, "warm_up": WARM_UP}
    record = {"host": host, "malloc": setting, "work": work, "sizes": sorted([*kept, entry], key=key)}
    RECORDS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def key(entry: dict[str, object]) -> tuple[int, ...]:
    """Operators in their order, then plain convolutions before strided ones, then larger images first."""
    settings = [-int(str(entry["kernel"])), int(str(entry["channels"])), -int(str(entry["size"]))]
    return TRIPLE.index(str(entry["operator"])), int(str(entry["stride"])), *settings
