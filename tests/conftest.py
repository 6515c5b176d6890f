"""Fixtures of all tests: one seed, one thread, and memory that is poisoned until it is written."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples on every machine, and no folder that remembers failures.
_EXPECTED = [HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow]
settings.register_profile(
    "bsfast", derandomize=True, deadline=None, database=None, max_examples=60, suppress_health_check=_EXPECTED
)
settings.load_profile("bsfast")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests make their tensors on the device that ``--device`` names."""
    parser.addoption("--device", default="cpu", help="device of all tensors that tests make")


def pytest_configure(config: pytest.Config) -> None:
    """Set it before test files are loaded, which make tensors, too."""
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))
        torch.backends.cudnn.allow_tf32 = False  # tolerances are those of float32


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests are small: on a busy machine, waiting for a second thread makes them 50 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill whatever torch.empty and its like return with NaN, so that an element nobody writes fails a comparison."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
