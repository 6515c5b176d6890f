"""Traces, diagonals and spectral densities: exact where theory allows, unbiased with honest errors elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bsfast.hessian import HessianOperator, diagonal, spectral_density, trace
from tests.hessian import truth
from tests.hessian.truth import error


def case(branch, M=2, **kwargs):
    net, branches = truth.make(branch, M)
    x, y = truth.batch(6)
    H = HessianOperator(net, F.cross_entropy, [(x[:4], y[:4]), (x[4:], y[4:])], coupling="block_diag", **kwargs)
    dense = truth.hessian(branches, F.cross_entropy, (x, y), H.parameters.names)
    return H, torch.stack([dense[own, own] for own in H.parameters.slices()])


def test_diagonal_and_trace_of_a_whole_piecewise_linear_net_are_exact():
    H, matrices = case(truth.relu_net)
    expected = matrices.diagonal(dim1=1, dim2=2)
    got = diagonal(H)
    assert (got.method, got.exact) == ("ggn", True)
    assert error(got.value, expected) < 1e-13
    assert got.stderr.abs().max() == 0
    total = trace(H)
    assert (total.method, total.exact) == ("ggn", True)
    assert error(total.value, expected.sum(1)) < 1e-13
    assert diagonal(H.variant(kind="residual")).value.abs().max() == 0


def test_diagonal_of_the_gauss_newton_term_of_a_smooth_net():
    net, branches = truth.make(lambda: truth.tanh_net(train=False), 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data, coupling="block_diag", kind="ggn")
    expected = truth.gauss_newton(branches, F.cross_entropy, data).diagonal().view(2, -1)
    got = diagonal(H)
    assert got.method == "ggn"
    assert error(got.value, expected) < 1e-13


@pytest.mark.parametrize("branch", [truth.tanh_net, lambda: truth.between(nn.GELU())], ids=["batch", "gelu"])
def test_no_shortcut_for_the_diagonal_of_other_nets(branch):
    net, branches = truth.make(branch, 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data, coupling="block_diag", params="0")
    expected = truth.hessian(branches, F.cross_entropy, data, H.parameters.names).diagonal().view(2, -1)
    ggn = truth.gauss_newton(branches, F.cross_entropy, data, H.parameters.names).diagonal().view(2, -1)
    assert error(ggn, expected) > 1e-3
    got = diagonal(H)
    assert (got.method, got.exact) == ("unit_vectors", True)
    assert error(got.value, expected) < 1e-12
    assert not trace(H, num_matvecs=4).exact


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_estimates_of_the_diagonal_are_unbiased_with_honest_errors(method):
    matrices = torch.randn(3, 30, 30, dtype=torch.float64)
    matrices = matrices + matrices.mT
    matrices[2] = 0
    expected = matrices.diagonal(dim1=1, dim2=2)
    results = [
        diagonal(matrices, method=method, num_matvecs=20, generator=torch.Generator().manual_seed(seed))
        for seed in range(300)
    ]
    mean = torch.stack([own.value for own in results]).mean(0)
    deviation = torch.stack([own.value for own in results]).std(0)
    assert (mean - expected).abs().max() < 5 * deviation.max() / 300**0.5
    assert 0.5 < results[0].stderr[0].mean() / deviation[0].mean() < 2
    assert results[0].value[2].abs().max() == 0
    totals = [
        trace(matrices, method="hutchinson", num_matvecs=20, generator=torch.Generator().manual_seed(s))
        for s in range(300)
    ]
    values = torch.stack([own.value for own in totals])
    assert ((values.mean(0) - expected.sum(1)).abs()[:2] < 5 * values.std(0)[:2] / 300**0.5).all()
    assert 0.5 < totals[0].stderr[0] / values.std(0)[0] < 2


def test_xdiag_is_exact_for_low_rank():
    V = torch.randn(2, 40, 5, dtype=torch.float64)
    matrices = V @ V.mT
    got = diagonal(matrices, method="xdiag", num_matvecs=24)
    assert error(got.value, matrices.diagonal(dim1=1, dim2=2)) < 1e-10
    rough = diagonal(matrices, method="hutchinson", num_matvecs=24)
    assert error(rough.value, matrices.diagonal(dim1=1, dim2=2)) > 1e-3


def test_branches_have_independent_random_vectors():
    matrix = torch.randn(20, 20, dtype=torch.float64)
    twice = (matrix + matrix.mT).expand(2, 20, 20)
    values = trace(twice, method="hutchinson", num_matvecs=5).value
    assert values[0] != values[1]


def test_trace_errors():
    with pytest.raises(ValueError, match="method must be 'auto' or 'hutchinson', got 'exact'"):
        trace(torch.eye(3), method="exact")
    with pytest.raises(ValueError, match="num_matvecs must be at least 4, got 2"):
        diagonal(torch.eye(3), method="xdiag", num_matvecs=2)


def test_spectral_density_of_two_clusters():
    values = torch.cat([torch.full((60,), -1.0), torch.full((40,), 4.0)]).double()
    Q, _ = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))
    matrices = torch.stack([Q @ torch.diag(values) @ Q.mT, torch.diag(values) * 2, torch.zeros(100, 100).double()])
    got = spectral_density(matrices, lanczos_steps=20, num_probes=40)
    integral = torch.trapezoid(got.density, got.grid)
    torch.testing.assert_close(integral, torch.ones(3).double(), atol=1e-3, rtol=0)
    low = torch.where(got.grid < 1, got.density, 0)
    torch.testing.assert_close(torch.trapezoid(low, got.grid)[:2], torch.full((2,), 0.6).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(got.weights.sum(2), torch.ones(3, 40).double())
    assert ((got.nodes[0] + 1).abs().minimum((got.nodes[0] - 4).abs())[got.weights[0] > 1e-9] < 1e-8).all()
    assert torch.equal(got.density, spectral_density(matrices, lanczos_steps=20, num_probes=40).density)


def test_spectral_density_integrates_functions_of_the_hessian():
    H, matrices = case(lambda: truth.tanh_net(train=False), params="5")
    got = spectral_density(H, lanczos_steps=30, num_probes=30)
    for power in (1, 2):
        expected = torch.linalg.eigvalsh(matrices).pow(power).mean(1)
        values = (got.nodes.pow(power) * got.weights).sum(2)
        assert ((values.mean(1) - expected).abs() < 4 * values.std(1) / 30**0.5).all()
    with pytest.raises(ValueError, match="num_probes must be larger, got 0"):
        spectral_density(H, num_probes=0)
