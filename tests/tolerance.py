"""How far a result may lie from the truth, from its dtype and the length of its sums, in one place."""

import math

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype, sum_length: int) -> float:
    """Bound of the relative L2 error: the rounding errors of a sum add up like a random walk, times a margin of 4.

    Numbers of 16 bits are summed in float32, and rounded once.
    """
    own = torch.finfo(dtype).eps
    summed = 4 * min(own, torch.finfo(torch.float32).eps) * math.sqrt(sum_length)
    return summed if dtype.itemsize > 2 else own + summed


def assert_close(actual: Tensor, expected: Tensor, sum_length: int, dtype: torch.dtype | None = None) -> None:
    """Compare shapes, and values by their relative L2 distance; NaN fails. ``expected`` may be more precise."""
    assert actual.shape == expected.shape
    assert actual.dtype == (dtype or actual.dtype)
    difference = torch.linalg.vector_norm(actual.double() - expected.double()).item()
    bound = tolerance(dtype or actual.dtype, sum_length) * torch.linalg.vector_norm(expected.double()).item()
    assert difference <= bound, f"L2 distance {difference:.3g} is above {bound:.3g}"
