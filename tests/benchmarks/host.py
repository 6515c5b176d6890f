"""The machine of a measurement: what it is, how fast it can be, whether other processes use it."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "OMP_")  # what environment variables that matter begin with
QUIET = 0.8  # a measured peak below this part of the expected one means that other processes take the cores


def describe_host() -> dict[str, Any]:
    """Machine, versions, threads and what else changes a measurement."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(SETTINGS)]
    return {
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} CPUs",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "environment": settings,
    }


def why_busy(peaks: Sequence[float], single: float, threads: int) -> str | None:
    """Say that the threads were slower together than one by itself promises, in GFLOP/s of multiply-adds."""
    if min(peaks) >= QUIET * max(*peaks, single * threads):
        return None
    return f"the machine is busy: {threads} threads reached {min(peaks):.0f} GFLOP/s, one {single:.0f}"
