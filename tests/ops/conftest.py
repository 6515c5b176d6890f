"""All operator tests run on poisoned memory."""

from collections.abc import Callable, Iterator

import pytest

from bsfast.ops import plan


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    pass


@pytest.fixture
def winograd_tile() -> Iterator[Callable[[int], None]]:
    """Set the largest tile for one test."""
    before = plan._largest_tile
    yield plan.set_winograd_tile
    plan.set_winograd_tile(before)
