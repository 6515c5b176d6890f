"""The benchmarks of Hessians themselves, on a tiny network: contestants compute the same."""

import pytest
import torch

from bsfast.ops.backend import native_why_not
from tests.benchmarks import measure_hessian
from tests.benchmarks.hessian_contestants import EIGENVALUES, MATRICES, PRODUCTS, SINGLE_COLUMNS, Problem
from tests.benchmarks.network_case import NetworkCase

WHY_NOT = native_why_not("cpu")
TINY = NetworkCase(branches=2, samples=3, widths=(1, 2, 2, 2))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # BackPACK's
def test_contestants_compute_one_matrix():
    some = torch.eye(54, dtype=torch.float64)[:, [0, 20, 53]]
    truth = SINGLE_COLUMNS["autograd, a column at a time"](Problem(TINY, torch.float64))(some)
    for make in MATRICES.values():
        torch.testing.assert_close(make(Problem(TINY, torch.float64))() @ some, truth, rtol=1e-9, atol=1e-12)
    for make in SINGLE_COLUMNS.values():
        torch.testing.assert_close(make(Problem(TINY, torch.float64))(some), truth, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_contestants_compute_one_product_and_spectrum():
    size = sum(p.numel() for branch in Problem(TINY).branches for p in branch.parameters())
    u = torch.randn(size, dtype=torch.float64)
    products = [make(Problem(TINY, torch.float64))(u) for make in PRODUCTS.values()]
    assert all(torch.allclose(own, products[0], rtol=1e-9, atol=1e-12) for own in products)
    values = [make(Problem(TINY, torch.float64), 1) for make in EIGENVALUES.values()]
    assert all(torch.allclose(own, values[0], rtol=1e-2) for own in values)


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")
@pytest.mark.parametrize("work", ["matrix", "columns", "products", "eigenvalues"])
def test_measure(work, monkeypatch):
    monkeypatch.setattr(measure_hessian, "PAIRS", 1)
    names = {"columns": "autograd, a column at a time"}
    entry = measure_hessian.measure(TINY, work, names.get(work, "bsfast"), rounds=2)
    assert 0 < entry["least_s"] <= entry["median_s"]
    assert entry["rounds"] == 2
    assert ("error" in entry) == (work in {"matrix", "columns"})
    assert entry.get("error", 0) < 1e-4
    assert entry.get("columns", 54) == 54
