"""Conversion to batch-last memory by Triton, on a GPU or interpreted: every element and its gradient, and errors."""

import pytest
import torch

from bsfast import layout, ops
from tests.ops.test_batch_norm_triton import DEVICE, DTYPES, WHY_NOT

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no Triton kernels: {WHY_NOT}")

SHAPES = [(2, 33, 3, 5, 4), (1, 7, 2, 4, 9), (34, 3, 5, 5), (3, 2, 1, 1, 2)]
SAME = [(2, 1, 3, 5, 4), (2, 5, 1, 1, 1), (0, 3, 2, 2, 2), (2, 0, 2, 2, 2)]  # orders in which they are the same


@pytest.fixture
def calls(monkeypatch):
    """The shapes that the kernel is given."""
    found, own = [], torch.ops.bsfast.transpose_out
    monkeypatch.setattr(torch.ops.bsfast, "transpose_out", lambda x, out: (found.append(tuple(x.shape)), own(x, out)))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_batch_last_triton_moves_every_element(calls, shape, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    y = ops.to_batch_last(x)
    assert len(calls) == 1
    assert layout.is_batch_last(y)
    assert torch.equal(y, x)
    assert ops.to_batch_last(y) is y
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad)
    assert len(calls) == 1


def test_to_batch_last_triton_is_differentiable_any_number_of_times():
    x = torch.randn(2, 3, 2, 3, 2, dtype=torch.float64, device=DEVICE).requires_grad_()
    torch.autograd.gradcheck(ops.to_batch_last, x)
    torch.autograd.gradgradcheck(ops.to_batch_last, x)


@pytest.mark.parametrize("shape", SAME, ids=str)
def test_to_batch_last_triton_leaves_what_is_the_same_in_both_orders(calls, shape):
    x = torch.randn(shape, device=DEVICE)
    y = ops.to_batch_last(x)
    assert torch.equal(y, x)
    assert calls == []


def test_to_batch_last_triton_leaves_the_rest_to_stock_operators(calls):
    x = torch.randn(2, 5, 3, 4, 4, device=DEVICE)
    assert torch.equal(torch.func.vmap(ops.to_batch_last)(torch.stack([x, x]))[1], x)
    assert torch.equal(torch.func.jvp(ops.to_batch_last, (x,), (x,))[1], x)
    assert torch.equal(ops.to_batch_last(x.mT), x.mT)
    assert ops.to_batch_last(x.int()).dtype == torch.int32
    assert calls == []


def test_transpose_out_guards_memory():
    x = torch.zeros(2, 3, 4, device=DEVICE)
    for out in (torch.zeros(2, 3, 4), torch.zeros(2, 4, 3).double(), torch.zeros(4, 3)):
        with pytest.raises(
            RuntimeError, match="transpose_out: out must be as x with its last two axes exchanged, got "
        ):
            torch.ops.bsfast.transpose_out(x, out.to(DEVICE))
    with pytest.raises(RuntimeError, match="transpose_out: x and out must be contiguous"):
        torch.ops.bsfast.transpose_out(x, x.mT)
