"""Products with the Hessian against functional autodiff of plain modules: couplings, kinds, forms, data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bsfast
from bsfast.hessian import HessianOperator
from bsfast.reference import ReferenceBranched
from tests.hessian import truth
from tests.hessian.truth import error

EXACT = 1e-13


@pytest.fixture(params=["relu", "tanh-batch-statistics"])
def branch(request):
    return {"relu": truth.relu_net, "tanh-batch-statistics": truth.tanh_net}[request.param]


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss], ids=["ce", "mse"])
def test_operator_is_the_hessian_of_the_loss(branch, M, loss):
    net, branches = truth.make(branch, M)
    x, y = truth.batch()
    data = (x, y) if loss is F.cross_entropy else (x, torch.randn(truth.SAMPLES, truth.CLASSES).double())
    plain = F.cross_entropy if loss is F.cross_entropy else truth.mse
    expected = truth.hessian(branches, plain, data)
    H = HessianOperator(net, loss, data)
    own = truth.block_diagonal(expected, H.parameters.slices())
    V = torch.randn(H.shape[0], 2, dtype=torch.float64)
    assert error(H @ V, expected @ V) < EXACT
    assert error(H.variant(coupling="block_diag") @ V, own @ V) < EXACT
    if M > 1:
        assert error(H.variant(coupling="cross") @ V, (expected - own) @ V) < EXACT
    ggn = truth.gauss_newton(branches, plain, data)
    assert error(H.variant(kind="ggn") @ V, ggn @ V) < EXACT
    assert error(H.variant(kind="residual") @ V, (expected - ggn) @ V) < EXACT


def test_blocks_of_two_branches_are_gauss_newton_blocks():
    net, branches = truth.make(truth.tanh_net, 2)
    data, names = truth.batch(), ["1.weight", "1.bias", "5.bias"]
    H = HessianOperator(net, F.cross_entropy, data, params=names)
    ggn, (a, b) = truth.gauss_newton(branches, F.cross_entropy, data, names), H.parameters.slices()
    full = truth.hessian(branches, F.cross_entropy, data, names)
    assert error(H.to_dense(), full) < EXACT
    assert error(full[a, a], ggn[a, a]) > 0.01
    assert error(H[0, 1].to_dense(), ggn[a, b]) < EXACT
    assert error(H[1, 0].T.to_dense(), ggn[a, b]) < EXACT
    assert error(H[-1, 0].to_dense(), ggn[b, a]) < EXACT


def test_block_diagonal_product_is_that_of_the_surrogate_and_of_separate_products(branch):
    net, branches = truth.make(branch, 3)
    x, y = truth.batch()
    outputs, theta, slices = truth.as_function(branches)

    def surrogate(t):
        vs = outputs(t, x)
        return sum(F.cross_entropy(v + (sum(vs) - v).detach(), y) for v in vs)

    u = torch.randn_like(theta)
    t = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(t), t, create_graph=True)
    (of_surrogate,) = torch.autograd.grad(gradient @ u, t)
    H = HessianOperator(net, nn.CrossEntropyLoss(), (x, y), coupling="block_diag")
    got = H @ u
    assert error(got, of_surrogate) < EXACT
    separate = torch.cat([H[k, k] @ u[own] for k, own in enumerate(slices)])
    assert error(got, separate) < EXACT


def test_double_backward_and_finite_differences_agree_in_training():
    net, branches = truth.make(truth.tanh_net, 2)
    x, y = truth.batch()
    outputs, theta, _ = truth.as_function(branches)

    def gradient(t):
        t = t.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(sum(outputs(t, x)), y), t, create_graph=True)[0], t

    u = torch.randn_like(theta)
    g, t = gradient(theta)
    got = HessianOperator(net, F.cross_entropy, (x, y)) @ u
    assert error(got, torch.autograd.grad(g @ u, t)[0]) < EXACT
    difference = (gradient(theta + 1e-6 * u)[0] - gradient(theta - 1e-6 * u)[0]).detach() / 2e-6
    assert error(got, difference) < 1e-7


def test_batch_normalisation_with_running_statistics_in_training_mode():
    net, _ = truth.make(lambda: truth.tanh_net(train=False), 2)
    net.train()
    before = {name: own.clone() for name, own in net.named_buffers()}
    x, y = truth.batch()
    V = torch.randn(156, dtype=torch.float64)
    got = HessianOperator(net, F.cross_entropy, (x, y)) @ V
    branches = [b.train() for b in bsfast.unfuse(net)]
    for b in branches:
        b[1] = nn.BatchNorm2d(2, track_running_stats=False).double().requires_grad_()
    for k, b in enumerate(branches):
        b[1].load_state_dict({n: net.get_parameter(f"1.{n}")[k] for n in ("weight", "bias")})
    assert error(got, truth.hessian(branches, F.cross_entropy, (x, y)) @ V) < EXACT
    assert all(torch.equal(own, before[name]) for name, own in net.named_buffers())


def test_reference_with_branches_of_different_shapes():
    branches = [truth.relu_net(2).double(), truth.relu_net(3).double(), truth.tanh_net(1).double()]
    data = truth.batch()
    H = HessianOperator(ReferenceBranched(branches), F.cross_entropy, data, params=["0.bias", "1"])
    names = ["0.bias", "1.weight", "1.bias"]
    expected = truth.hessian(branches, F.cross_entropy, data, names)
    assert error(H.to_dense(), expected) < EXACT
    a, b, _ = H.parameters.slices()
    assert error(H[0, 1].to_dense(), expected[a, b]) < EXACT
    with pytest.raises(ValueError, match=r"must have branches of equal shapes, got P_k=\[6, 9, 3\]"):
        bsfast.hessian.eigsh(H.variant(coupling="block_diag"))


def test_fused_and_reference_agree():
    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    u = torch.randn(2, 127, dtype=torch.float64)
    for coupling in ("full", "block_diag", "cross"):
        own = HessianOperator(net, F.cross_entropy, data, coupling=coupling) @ u
        assert (
            error(own, HessianOperator(ReferenceBranched(branches), F.cross_entropy, data, coupling=coupling) @ u)
            < EXACT
        )


def test_forms_of_vectors_and_algebra():
    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data, params=["0", "6.weight"])
    dense = truth.hessian(branches, F.cross_entropy, data, ["0.weight", "0.bias", "6.weight"])
    D, P = H.shape[0], H.shape[0] // 2
    V = torch.randn(D, 2, dtype=torch.float64)
    assert error(H @ V, dense @ V) < EXACT
    assert error(V.mT @ H, V.mT @ dense) < EXACT
    assert error(V[:, 0] @ H.T, dense @ V[:, 0]) < EXACT
    assert error((H @ V.view(2, P, 2)).flatten(0, 1), dense @ V) < EXACT
    assert error((H @ V[:, 0].view(2, P)).flatten(), dense @ V[:, 0]) < EXACT
    named = {n: torch.randn_like(net.get_parameter(n).detach()) for n in reversed(H.parameters.names)}
    flat = torch.cat([named[n].flatten(1) for n in H.parameters.names], 1).flatten()
    got = H @ named
    assert error(torch.cat([got[n].flatten(1) for n in H.parameters.names], 1).flatten(), dense @ flat) < EXACT
    columns = {n: own.unsqueeze(-1) for n, own in named.items()}
    assert torch.equal((H @ columns)["0.bias"].squeeze(-1), got["0.bias"])
    combined = 2 * H + H.variant(kind="ggn") * -1.0 - (H @ H)
    expected = 2 * dense - truth.gauss_newton(branches, F.cross_entropy, data, H.parameters.names) - dense @ dense
    assert error(combined @ V, expected @ V) < EXACT
    assert error(combined.T @ V, expected @ V) < EXACT
    assert error((-H).to_dense(), -dense) < EXACT


def test_to_scipy_works_with_eigsh():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data, params="0")
    values = linalg.eigsh(H.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(truth.hessian(branches, F.cross_entropy, data, H.parameters.names))[-3:]
    torch.testing.assert_close(torch.from_numpy(values), expected)
    block = H[0, 1].to_scipy()
    V = torch.randn(H.shape[0] // 2, 2, dtype=torch.float64)
    assert error(torch.from_numpy(block.rmatmat(V.numpy())), H[1, 0] @ V) < EXACT


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ragged_batches_weigh_as_many_samples(reduction):
    net, branches = truth.make(truth.relu_net, 2)
    x, y = truth.batch(7)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    V = torch.randn(254, 2, dtype=torch.float64)
    expected = truth.hessian(branches, loss, (x, y)) @ V
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for data in ((x, y), [(x[:4], y[:4]), (x[4:], y[4:])], loader, DataLoader(TensorDataset(x, y), 2, shuffle=True)):
        assert error(HessianOperator(net, loss, data) @ V, expected) < EXACT
    for chunk_size in (1, 2, 5, None):
        assert error(HessianOperator(net, loss, (x, y), chunk_size=chunk_size) @ V, expected) < EXACT
    factor = 7 / 14 if reduction == "mean" else 1
    assert error(HessianOperator(net, loss, (x, y), num_data=14) @ V, factor * expected) < EXACT


def test_permuted_identical_and_silent_branches():
    net, branches = truth.make(truth.relu_net, 3)
    data = truth.batch()
    order = [2, 0, 1]
    permuted = bsfast.fuse([branches[k] for k in order])
    V = torch.randn(3, 127, 2, dtype=torch.float64)
    product = HessianOperator(net, F.cross_entropy, data) @ V
    assert error(HessianOperator(permuted, F.cross_entropy, data) @ V[order], product[order]) < EXACT
    same = bsfast.fuse([copy.deepcopy(branches[0]) for _ in range(2)])
    c = HessianOperator(same, F.cross_entropy, data) @ V[[0, 0]]
    assert error(c[0], c[1]) < EXACT
    with torch.no_grad():
        net.get_parameter("8.weight")[1] = 0
    H = HessianOperator(net, F.cross_entropy, data, params=["0", "1", "3"])
    P = H.parameters.sizes[0]
    d = H @ torch.randn(3, P, dtype=torch.float64)
    assert d[1].abs().max() == 0
    assert d[[0, 2]].abs().amax(1).min() > 0


def test_float32_up_to_kinks():
    torch.manual_seed(3)
    net, branches = truth.make(truth.tanh_net, 2)
    x, y = truth.batch()
    V = torch.randn(156, 2, dtype=torch.float64)
    expected = truth.hessian(branches, F.cross_entropy, (x, y)) @ V
    got = HessianOperator(net.float(), F.cross_entropy, (x.float(), y)) @ V.float()
    assert got.dtype == torch.float32
    assert error(got, expected) < 1e-4  # smooth: batch normalisation by few samples loses three digits
