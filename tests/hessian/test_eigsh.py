"""Lanczos in lockstep against dense eigenvalues of every branch."""

import pytest
import torch
import torch.nn.functional as F

from bsfast.hessian import HessianOperator, eigsh
from tests.hessian import truth


def with_spectrum(*spectra):
    """Symmetric matrices with given eigenvalues."""
    matrices = []
    for spectrum in spectra:
        values = torch.as_tensor(spectrum, dtype=torch.float64)
        Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
        matrices.append(Q @ torch.diag(values) @ Q.mT)
    return torch.stack(matrices)


def expected_values(matrices, k, which):
    values = torch.linalg.eigvalsh(matrices)
    keys = {"LM": -values.abs(), "LA": -values, "SA": values}[which]
    return values.gather(1, keys.argsort(1)[:, :k])


def check(matrices, result, k, which, atol=1e-8):
    torch.testing.assert_close(result.values.abs(), expected_values(matrices, k, which).abs(), atol=atol, rtol=1e-8)
    products = torch.einsum("bij,bkj->bki", matrices, result.vectors)
    torch.testing.assert_close(products, result.values[..., None] * result.vectors, atol=max(atol, 1e-7), rtol=0)
    grams = result.vectors @ result.vectors.mT
    torch.testing.assert_close(grams, torch.eye(k, dtype=grams.dtype).expand_as(grams), atol=1e-7, rtol=0)
    assert result.converged.all()


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_eigsh_of_indefinite_matrices(which, k):
    matrices = with_spectrum(torch.linspace(-3, 2, 20), torch.arange(20) ** 2 - 50.0, -torch.arange(20.0))
    check(matrices, eigsh(matrices, k, which=which), k, which)


def test_eigsh_of_degenerate_zero_and_low_rank_matrices():
    spectra = ([5.0] * 4 + [1.0] * 8, [0.0] * 12, [3.0, -3.0] + [0.0] * 10, [2.0] * 12, [0.0] * 11 + [-7.0])
    matrices = with_spectrum(*spectra)
    for k in (1, 3, 6, 12):
        check(matrices, eigsh(matrices, k), k, "LM")


def test_eigsh_of_a_large_matrix_stops_early_and_alone():
    values = torch.cat([torch.tensor([100.0, 90.0, -80.0]), torch.linspace(-1, 1, 397)])
    slow = torch.linspace(-1, 1, 400)
    easy, hard = with_spectrum(values), with_spectrum(values, slow)
    result = eigsh(easy, 3, tol=1e-10)
    assert result.num_matvecs < 40
    check(easy, result, 3, "LM", atol=1e-6)
    both = eigsh(hard, 3, tol=1e-10, max_iter=60)
    assert both.converged[0].all()
    assert not both.converged[1].all()
    torch.testing.assert_close(both.values[0], result.values[0])
    assert (both.residuals[0] < 1e-3).all()


@pytest.mark.parametrize("start", ["invariant", "random"])
def test_eigsh_goes_on_after_a_breakdown(start):
    """A first vector inside an invariant subspace knows nothing of the largest eigenvalue."""
    size = 200
    values = torch.zeros(size, dtype=torch.float64)
    values[:3] = torch.tensor([9.0, 4.0, 4.0])
    matrices = torch.diag(values).unsqueeze(0)
    v0 = torch.zeros(1, size, dtype=torch.float64)
    v0[0, 1], v0[0, 5] = 1, 1
    result = eigsh(matrices, 2, v0=v0 if start == "invariant" else None)
    check(matrices, result, 2, "LM")


def test_eigsh_of_branches_with_one_dead():
    net, branches = truth.make(lambda: truth.relu_net(3), 3)
    with torch.no_grad():
        net.get_parameter("8.weight")[1] = 0
    branches[1][8].weight.data.zero_()
    data = truth.batch()
    params = ["3.0.weight", "6.weight"]
    H = HessianOperator(net, F.cross_entropy, data, params=params, coupling="block_diag")
    dense = truth.hessian(branches, F.cross_entropy, data, params)
    matrices = torch.stack([dense[own, own] for own in H.parameters.slices()])
    result = eigsh(H, 3)
    check(matrices, result, 3, "LM")
    assert result.values[1].abs().max() == 0
    whole = eigsh(H.variant(coupling="full"), 2, which="LA", max_iter=80)
    torch.testing.assert_close(whole.values[0], torch.linalg.eigvalsh(dense).flip(0)[:2], atol=1e-6, rtol=1e-6)


def test_eigsh_of_float32():
    matrices = with_spectrum(torch.linspace(-3, 2, 200), 2.0 ** -torch.arange(200.0))
    result = eigsh(matrices.float(), 2, tol=1e-5, max_iter=150)
    assert result.values.dtype == torch.float32
    torch.testing.assert_close(result.values.double(), expected_values(matrices, 2, "LM"), atol=1e-4, rtol=1e-4)


def test_eigsh_is_reproducible():
    matrices = with_spectrum(torch.linspace(-3, 2, 150))
    state = torch.get_rng_state()
    results = [eigsh(matrices, 2, generator=torch.Generator().manual_seed(seed)).vectors for seed in (1, 1)]
    assert torch.equal(*results)
    assert torch.equal(eigsh(matrices, 2).vectors, eigsh(matrices, 2).vectors)
    assert torch.equal(torch.get_rng_state(), state)


def test_eigsh_errors():
    matrices = torch.eye(4).double()
    for arguments, message in [
        ({"k": 5}, "k must be between 1 and P=4, got 5"),
        ({"k": 1, "which": "BE"}, "which must be 'LM', 'LA' or 'SA', got 'BE'"),
        ({"k": 1, "v0": torch.ones(4).double()}, r"v0 must have shape \(1, 4\), got \(4,\)"),
        ({"k": 1, "v0": torch.zeros(1, 4).double()}, "v0 must be finite and not zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            eigsh(matrices, **arguments)
    with pytest.raises(ValueError, match=r"H must have shape \(P, P\) or \(B, P, P\), got \(4, 3\)"):
        eigsh(matrices[:, :3])
