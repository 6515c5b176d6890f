"""Products of all rows of matrices with each other: against float64, derivatives, transforms, errors."""

import sys

import pytest
import torch

from bsfast import ops
from tests.tolerance import assert_close

SHAPES = [(2, 65, 17), (1, 300, 40), (3, 512, 3), (1, 1, 1), (4, 3, 0), (2, 0, 5), (0, 3, 5)]


def truth(x, weights):
    x = x.double()
    return torch.einsum("brk,k,bsk->brs", x, torch.ones(x.shape[2]) if weights is None else weights.double(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_equals_all_products_in_float64(shape, weighted, dtype):
    x = torch.randn(shape).to(dtype)
    weights = torch.randn(shape[2]).to(dtype) if weighted else None
    product = ops.gram(x, weights)
    assert_close(product, truth(x, weights), shape[2], dtype)
    if len(product):
        assert_close(ops.gram(x.mT.contiguous().mT, weights), product, shape[2], dtype)


def test_gram_with_signs_is_symmetric_bit_for_bit_beside_the_diagonal_panels():
    x, signs = torch.randn(1, 700, 33), torch.randn(33).sign()
    product = ops.gram(x, signs)[0]
    assert torch.equal(product[256:, :256], product[:256, 256:].mT)


def test_gram_is_differentiable_and_transformable():
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(ops.gram, (x, weights))
    torch.autograd.gradgradcheck(ops.gram, (x, weights))
    x = x.detach()
    torch.autograd.gradcheck(lambda w: ops.gram(x, w), weights)
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(ops.gram)(several)[1], 4 * ops.gram(x))
    compiled = torch.compile(ops.gram, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weights.detach()), ops.gram(x, weights.detach()))


def test_gram_gives_reasons(monkeypatch):
    x = torch.randn(1, 2, 3, device="cpu")
    plan = ops.plan_gram(x)
    assert plan.algorithm == "aten"
    assert plan.reason
    assert ops.plan_gram(x.requires_grad_()).algorithm == "composite"
    monkeypatch.setattr(sys.modules["bsfast.ops.gram"], "kernel_why_not", lambda *_: None)
    assert ops.plan_gram(x.detach()).algorithm == "native"
    assert "more than 1024 rows" in ops.plan_gram(torch.zeros(1, 1025, 1, device="cpu")).reason
    assert "no own kernel" in ops.plan_gram(x.detach().double()).reason


def test_gram_errors_name_what_was_expected_and_what_came():
    x = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"gram: x must have shape \(B, R, K\), got \(4, 3\)"):
        ops.gram(x[0])
    with pytest.raises(ValueError, match=r"gram: weights must have shape \(K=3,\), got \(4,\)"):
        ops.gram(x, torch.ones(4))
    with pytest.raises(ValueError, match=rf"dtype and device of x, torch.float32 and {x.device}, got torch.float64"):
        ops.gram(x, torch.ones(3, dtype=torch.float64))
