"""The GPU of a measurement: what it is, how fast it can be, and how long work takes on it."""

import itertools
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEWEST, MOST, WARM_UP = 20, 60, 3  # rounds
FLUSHED_BYTES = 256 * 2**20  # written before each measurement: more than the second-level cache of any GPU
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"


def why_no_gpu() -> str | None:
    """Say that this machine has no GPU for torch, or None if it has."""
    if torch.version.cuda is None:
        return f"this machine's torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA device on this machine"


def describe(device: str) -> dict[str, Any]:
    """Device and versions, which decide what a number means."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cpu":
        return {"device": f"{platform.machine()} CPU", **versions}
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"sm_{major}{minor}",
        "memory_gib": round(memory / 2**30),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **versions,
    }


def file_name(host: Mapping[str, Any]) -> str:
    """Name of the record of a device."""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", host["device"].lower()).strip("-") + ".json"


def clocks(device: str) -> dict[str, str]:
    """Clocks, power limit and driver, as nvidia-smi gives them; nothing where it is missing."""
    if device == "cpu" or shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(zip(CLOCKS.split(","), done.stdout.strip().split(", "), strict=False)) if done.returncode == 0 else {}


class Timer:
    """Times works that take turns on a device.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        seconds: No further round begins after this time, but for the fewest.
        rounds: Exactly so many instead.
    """

    def __init__(self, device: str, seconds: float, rounds: int | None = None) -> None:
        self.device, self.seconds, self.rounds = device, seconds, rounds
        self.flushed = torch.empty(FLUSHED_BYTES if device == "cuda" else 0, dtype=torch.uint8, device=device)

    def run(self, works: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
        """Return median and quartiles in ms for each work; caches are cold at the start of each."""
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(WARM_UP):
            for work in works.values():
                work()
        began = time.perf_counter()
        for turn in itertools.count():
            fewest, most = (self.rounds, self.rounds) if self.rounds else (FEWEST, MOST)
            if turn >= most or (turn >= fewest and time.perf_counter() - began > self.seconds):
                break
            for name, work in works.items():
                times[name].append(self._once(work))
        return {name: summary(values) for name, values in times.items()}

    def _once(self, work: Callable[[], object]) -> float:
        if self.device == "cpu":
            begin = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - begin)
        self.flushed.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def summary(values: list[float]) -> dict[str, Any]:
    """Median and quartiles, to four digits."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    first, median, third = (float(f"{value:.4g}") for value in quartiles)
    return {"median_ms": median, "quartiles_ms": [first, third], "rounds": len(values)}


def peaks(timer: Timer, size: int) -> dict[str, float]:
    """Measure the limits of the device.

    Args:
        timer: Of the device.
        size: Rows of square matrices.

    Returns:
        GB/s that a copy reads and writes, and TFLOP/s of a matrix product in each dtype (float32 without TF32).
    """
    source, target = (torch.empty(size, 8 * size, device=timer.device) for _ in range(2))
    works: dict[str, Callable[[], object]] = {"copy_gb_s": lambda: target.copy_(source)}
    for dtype in DTYPES:
        a, b = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
        works[name_of(dtype)] = lambda a=a, b=b: a @ b
    times = {name: values["median_ms"] for name, values in timer.run(works).items()}
    rates = {name: 2e-9 * size**3 / ms for name, ms in times.items() if name != "copy_gb_s"}
    rates["copy_gb_s"] = 2e-6 * source.nbytes / times["copy_gb_s"]
    return {name: round(rate, 1 if rate > 10 else 4) for name, rate in rates.items()}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def least_ms(gflop: float, moved: float, dtype: torch.dtype, peaks: Mapping[str, float]) -> float:
    """Least time for arithmetic in a dtype and for bytes that are moved, whichever takes longer."""
    return max(gflop / peaks[name_of(dtype)], 1e-6 * moved / peaks["copy_gb_s"])


def add_rates(results: Mapping[str, dict[str, Any]], gflop: float, moved: float, floor: float) -> None:
    """Add to the times of each way TFLOP/s, GB/s, and which share of its time a floor in ms is."""
    for values in results.values():
        if "error" not in values:
            ms = values["median_ms"]
            values["tflop_s"], values["gb_s"] = round(gflop / ms, 3), round(1e-6 * moved / ms, 1)
            values["share_of_floor"] = round(floor / ms, 3)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a work returns, or the error by which a stock way refuses."""
    try:
        return work()
    except Exception as error:  # torch's own, out of memory among them, and those of its compilers
        return refusal(error)


def refusal(error: Exception) -> dict[str, Any]:
    """What a record says of an error."""
    said = str(error).splitlines() or [""]
    return {"error": f"{type(error).__name__}: {said[0][:300]}"}


def graphed(work: Callable[[], object], device: str) -> Callable[[], object]:
    """Capture a work into a CUDA graph, after warming it up on a stream of its own; on the CPU it stays as it is."""
    if device == "cpu":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
