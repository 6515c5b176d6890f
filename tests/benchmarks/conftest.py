"""Benchmarks use every CPU of the process, and say on what they ran."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.benchmarks.host import describe_host


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Override the fixture of the other tests: all CPUs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def host() -> dict[str, Any]:
    return describe_host()
