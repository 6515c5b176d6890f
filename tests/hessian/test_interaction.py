"""Norms of all blocks, by elements and by Gram matrices; gradient factors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bsfast
from bsfast.hessian import HessianOperator, block_interaction, gradient_factors
from bsfast.reference import ReferenceBranched
from tests.hessian import truth
from tests.hessian.truth import error


def norms(dense, slices):
    return torch.stack([torch.stack([dense[a, b].norm() for b in slices]) for a in slices])


@pytest.mark.parametrize("params", ["0", "6", None])
@pytest.mark.parametrize("branch", [truth.relu_net, lambda: truth.tanh_net(train=False)], ids=["relu", "tanh"])
@pytest.mark.parametrize("method", ["gram", "blocks"])
def test_norms_of_blocks(params, branch, method):
    if params == "6" and branch is not truth.relu_net:
        params = "5"
    if params is None and (method == "blocks" or branch is truth.relu_net):
        params = ["0.bias", "1"]
    net, branches = truth.make(branch, 3)
    x, y = truth.batch()
    H = HessianOperator(net, F.cross_entropy, [(x[:3], y[:3]), (x[3:], y[3:])], params=params)
    dense = truth.hessian(branches, F.cross_entropy, (x, y), H.parameters.names)
    got = block_interaction(H, method=method)
    assert (got.method, got.exact) == (method, True)
    expected = norms(dense, H.parameters.slices())
    assert error(got.fro, expected) < 1e-10
    assert got.beta == pytest.approx((expected.diagonal().square().sum() / dense.square().sum()).item())
    k01 = expected[0, 1] / (expected[0, 0] * expected[1, 1]).sqrt()
    assert got.kappa[0, 1].item() == pytest.approx(k01.item())
    assert got.mean_kappa(torch.tensor([True, True, False])) == pytest.approx(k01.item())


def test_gram_matrices_are_wrong_for_the_own_block_of_a_whole_branch():
    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    dense, ggn = (f(branches, F.cross_entropy, data) for f in (truth.hessian, truth.gauss_newton))
    H = HessianOperator(net, F.cross_entropy, data)
    assert error(ggn[:127, :127].norm(), dense[:127, :127].norm()) > 0.05
    got = block_interaction(H)
    assert got.method == "gram"
    assert error(got.fro, norms(dense, H.parameters.slices())) < 1e-10
    own = block_interaction(H.variant(kind="ggn"))
    assert error(own.fro, norms(ggn, H.parameters.slices())) < 1e-10


def test_own_norms_of_large_branches_are_estimated(monkeypatch):
    monkeypatch.setattr("bsfast.hessian.interaction.LARGEST_DENSE", 10)
    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data)
    expected = norms(truth.hessian(branches, F.cross_entropy, data), H.parameters.slices())
    got = block_interaction(H, num_matvecs=40)
    assert not got.exact
    assert ((got.fro - expected).abs() <= 4 * got.stderr + 1e-9 * expected).all()
    assert got.stderr[0, 1] == 0
    assert got.stderr[0, 0] > 0


def test_a_loss_with_negative_curvature_needs_signs():
    def loss(f, y):
        return (torch.sin(3 * f) * F.one_hot(y, 4)).sum(1).mean()

    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    H = HessianOperator(net, loss, data, params="0.weight")
    dense = truth.hessian(branches, loss, data, ["0.weight"])
    assert torch.linalg.eigvalsh(dense)[0] < -1e-3
    assert error(block_interaction(H, method="gram").fro, norms(dense, H.parameters.slices())) < 1e-10
    result = bsfast.hessian.blocks(net, loss, data, params="0.weight", which="all")
    assert result.method == "ggn"
    assert error(result.dense(), dense) < 1e-12
    rows = bsfast.hessian.blocks(net, loss, data, params="6", which="all")
    assert rows.method == "khatri_rao"
    assert error(rows.dense(), truth.hessian(branches, loss, data, ["6.weight", "6.bias"])) < 1e-12


def test_a_loss_that_mixes_samples():
    def loss(f, y):
        return f.square().sum().sqrt() + 0 * y.sum()

    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    result = bsfast.hessian.blocks(net, loss, data, params="0.weight", which="all")
    assert (result.method, result.why) == ("hvp", "the loss mixes samples, or has too many outputs a sample")
    assert error(result.dense(), truth.hessian(branches, loss, data, ["0.weight"])) < 1e-12
    with pytest.raises(ValueError, match="must be 'auto', 'hvp' or 'autograd' here, got 'ggn': the loss mixes samples"):
        bsfast.hessian.blocks(net, loss, data, params="0.weight", method="ggn")
    with pytest.raises(ValueError, match="chunk_size must be None where the loss is not a mean or sum over samples"):
        HessianOperator(net, loss, data, chunk_size=2)


def test_interaction_errors():
    net, _ = truth.make(truth.tanh_net, 2)
    H = HessianOperator(net, F.cross_entropy, truth.batch(), params="5.bias")
    with pytest.raises(ValueError, match="must be 'auto' or 'blocks' here, got 'gram': batch normalisation"):
        block_interaction(HessianOperator(net, F.cross_entropy, truth.batch(), params="0"), method="gram")
    with pytest.raises(TypeError, match="H must be a HessianOperator, got Tensor"):
        block_interaction(torch.eye(3))
    assert block_interaction(H).method == "blocks"


@pytest.mark.parametrize("reference", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "sum"])
def test_gradient_factors(reference, loss):
    net, branches = truth.make(truth.tanh_net, 3)
    x, y = truth.batch()
    outputs, theta, slices = truth.as_function(branches)
    t = theta.clone().requires_grad_()
    vs = outputs(t, x)
    f = sum(vs)
    value = loss(f, y)
    expected, dldf = torch.autograd.grad(value, [t, f])
    g = gradient_factors(ReferenceBranched(branches) if reference else net, loss, (x, y))
    assert error(g.dldf, dldf) < 1e-14
    jacobian = torch.func.jacrev(lambda t: torch.stack(outputs(t, x)).flatten(1))(theta)
    for k, own in enumerate(slices):
        J = jacobian[k][:, own]
        assert error(g.grad(k), expected[own]) < 1e-13
        assert error(g.J[k].T @ g.dldf.flatten(), expected[own]) < 1e-13
        U, C = torch.randn(J.shape[1], 2).double(), torch.randn(J.shape[0], 2).double()
        assert error(g.J[k] @ U, J @ U) < 1e-13
        assert error(g.J[k].T @ C, J.mT @ C) < 1e-13
    assert error(g.J[0].gram(), jacobian[0] @ jacobian[0].mT) < 1e-13
    with pytest.raises(ValueError, match="batch must be one batch"):
        gradient_factors(net, loss, [(x, y), (x, y)])
