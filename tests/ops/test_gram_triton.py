"""Products of all rows with each other by Triton, on a GPU or interpreted: against float64, repeatability, errors."""

import pytest
import torch

from bsfast import ops
from tests.ops.test_batch_norm_triton import DEVICE, WHY_NOT
from tests.ops.test_gram import truth
from tests.tolerance import assert_close

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no Triton kernels: {WHY_NOT}")

SHAPES = [(2, 65, 17), (1, 130, 40), (3, 64, 16), (1, 1, 1), (2, 3, 0), (2, 0, 5), (0, 3, 5)]


@pytest.fixture
def calls(monkeypatch):
    """The shapes that the kernel is given."""
    found, own = [], torch.ops.bsfast.gram_out
    monkeypatch.setattr(torch.ops.bsfast, "gram_out", lambda x, *rest: (found.append(tuple(x.shape)), own(x, *rest)))
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_triton_equals_all_products_in_float64(calls, shape, weighted):
    x, weights = torch.randn(shape), torch.randn(shape[2]) if weighted else None
    own = [None if t is None else t.to(DEVICE) for t in (x, weights)]
    product = ops.gram(*own)
    assert calls == [shape]
    assert_close(product.cpu(), truth(x, weights).cpu(), shape[2], torch.float32)
    assert torch.equal(ops.gram(*own), product)


def test_gram_triton_with_signs_is_symmetric_bit_for_bit():
    product = ops.gram(torch.randn(2, 70, 33, device=DEVICE), torch.randn(33, device=DEVICE).sign())
    assert torch.equal(product, product.mT)


def test_gram_triton_leaves_the_rest_to_stock_operators(calls):
    x = torch.randn(2, 5, 3, device=DEVICE)
    assert ops.gram(x.double()).dtype == torch.float64
    assert ops.gram(x.requires_grad_()).requires_grad
    assert torch.func.vmap(ops.gram)(x.detach()[None]).shape == (1, 2, 5, 5)
    assert calls == []


def test_gram_out_guards_memory():
    x, out = torch.zeros(2, 4, 3, device=DEVICE), torch.zeros(2, 4, 4, device=DEVICE)
    gram_out = torch.ops.bsfast.gram_out
    with pytest.raises(RuntimeError, match=r"gram_out: x must have shape \(B, R, K\), got \(4, 3\)"):
        gram_out(x[0], None, out)
    with pytest.raises(RuntimeError, match=r"gram_out: out must have shape \(2, 4, 4\), got \(2, 4, 3\)"):
        gram_out(x, None, x)
    with pytest.raises(RuntimeError, match=r"gram_out: weights must have shape \(3\), got \(4\)"):
        gram_out(x, out[0, 0], out)
    for wrong in ((x.double(), None, out), (x.mT.contiguous().mT, None, out), (x, None, out.half())):
        with pytest.raises(RuntimeError, match=r"gram_out: .* must be contiguous and have dtype float32, got "):
            gram_out(*wrong)
