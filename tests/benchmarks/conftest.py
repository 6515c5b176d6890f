"""Benchmarks use every CPU of the process, and say on what they ran."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Override the fixture of the other tests: all CPUs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def host() -> dict[str, Any]:
    """Machine, versions, threads and what else changes a measurement."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(("MALLOC_", "OMP_"))]
    return {
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} CPUs",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "environment": settings,
    }
