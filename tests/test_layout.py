"""The batch-last memory format."""

import pytest
import torch

from bsfast.layout import batch_last_strides, empty_batch_last, is_batch_last, to_batch_last
from tests.cases import CONV, in_order


@pytest.mark.parametrize("case", CONV, ids=str)
def test_to_batch_last(case):
    for t in (case.x(), case.grad()):
        moved = to_batch_last(t)
        assert torch.equal(moved, t)
        assert is_batch_last(moved) or moved.is_contiguous()
        assert is_batch_last(moved) == (not in_order(t, "batch_last").is_contiguous())
        assert to_batch_last(moved).data_ptr() == moved.data_ptr()


@pytest.mark.parametrize("shape", [(2, 5, 3, 4, 6), (5, 3, 4, 6), (1, 2, 1, 2, 1)], ids=str)
def test_empty_batch_last(shape):
    empty = empty_batch_last(shape, dtype=torch.float64, device=torch.device("cpu"))
    assert (empty.shape, empty.dtype) == (shape, torch.float64)
    assert empty.stride() == batch_last_strides(shape) == in_order(torch.empty(shape), "batch_last").stride()
    assert is_batch_last(empty)


def test_is_batch_last_refuses_others():
    x = in_order(torch.zeros(2, 5, 3, 4, 6), "batch_last")
    assert is_batch_last(x)
    assert is_batch_last(x[0])
    assert is_batch_last(x[1:])
    assert not is_batch_last(x[:, :4])
    assert not is_batch_last(x[:, :, :2])  # a hole between branches
    assert not is_batch_last(x.transpose(-1, -2))
    assert not is_batch_last(x.sum(0).sum(0))
    assert not is_batch_last(torch.zeros(2, 5, 3, 4, 6))
    assert not is_batch_last(torch.zeros(2, 1, 3, 4, 6))  # either order: contiguous
    assert not is_batch_last(torch.zeros(3).expand(2, 5, 3, 4, 3))
