"""Losses: closed forms against autograd, roots, and Hessians of linear models in closed form without autodiff."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jacfwd

import bsfast
from bsfast.hessian import ClampedCrossEntropy, CrossEntropy, HessianOperator, Loss, MeanSquaredError, blocks
from bsfast.hessian.losses import as_loss
from tests.hessian import truth
from tests.hessian.truth import error

N, C = 6, 4


def clamped(f, y):
    """The paper's loss, written out."""
    targets = torch.softmax(2 * F.one_hot(y, C).to(f.dtype) - 1, 1)
    return -(targets * f.clamp(-1, 1).log_softmax(1)).sum(1).mean()


def soft(f, p):
    return -(p * f.log_softmax(1)).sum(1).mean()


def cases():
    labels, soft_targets = torch.randint(C, (N,)), torch.rand(N, C).double()
    return {
        "ce": (nn.CrossEntropyLoss(), F.cross_entropy, labels),
        "ce-function": (F.cross_entropy, F.cross_entropy, labels),
        "ce-sum": (nn.CrossEntropyLoss(reduction="sum"), lambda f, y: N * F.cross_entropy(f, y), labels),
        "ce-smoothed": (
            nn.CrossEntropyLoss(label_smoothing=0.2),
            lambda f, y: soft(f, 0.8 * F.one_hot(y, C).double() + 0.05),
            labels,
        ),
        "soft-targets": (CrossEntropy(), soft, soft_targets),  # which do not sum to 1
        "ce-smoothed-soft-targets": (
            nn.CrossEntropyLoss(label_smoothing=0.2),
            lambda f, y: F.cross_entropy(f, y, label_smoothing=0.2),
            2 * torch.rand(N, C).double(),
        ),
        "paper": (ClampedCrossEntropy(), clamped, labels),
        "paper-as-a-function": (clamped, clamped, labels),
        "mse": (nn.MSELoss(), truth.mse, torch.randn(N, C).double()),
        "mse-sum": (MeanSquaredError("sum"), lambda f, y: (f - y).square().sum(), torch.randn(N, C).double()),
        "own": (lambda f, y: (f[:, 0] * f[:, 1] + f.exp().sum(1)).mean() + 0 * y.sum(), None, labels),
    }


@pytest.mark.parametrize("name", cases())
def test_derivatives_of_losses(name):
    given, plain, y = cases()[name]
    plain = plain or given
    loss, f = as_loss(given), torch.randn(N, C, dtype=torch.float64) * 1.5
    torch.testing.assert_close(loss.value(f, y), plain(f, y))
    assert error(loss.gradient(f, y), grad(plain)(f, y)) < 1e-14
    expected = jacfwd(grad(lambda u: plain(u.view(N, C), y)))(f.flatten()).view(N, C, N, C)
    U = torch.randn(3, N, C, dtype=torch.float64)
    assert error(loss.hvp(f, y, U), torch.einsum("ncmd,kmd->knc", expected, U)) < 1e-13
    root = loss.root(f, y)
    signed = root.columns if root.signs is None else root.columns * root.signs[:, None]
    assert error(signed @ root.columns.mT, expected[range(N), :, range(N)]) < 1e-13
    if "ce" in name or "paper" in name or name == "soft-targets":
        assert root.columns.shape[2] == (C if name == "paper-as-a-function" else C - 1)


def test_root_of_saturated_logits_is_finite():
    f = torch.tensor([[0.0, -60.0, -700.0, -800.0], [40.0, 0.0, 0.0, -90.0]], dtype=torch.float64)
    R = CrossEntropy("sum").root(f, torch.tensor([0, 1])).columns
    p = f.softmax(1)
    assert (R @ R.mT - (torch.diag_embed(p) - p[:, :, None] * p[:, None])).abs().max() < 1e-15


def test_own_hvp_and_sqrt_are_used():
    class Own:
        reduction = "sum"
        calls = 0

        def __call__(self, f, y):
            return f.square().sum()

        def hvp(self, f, y, u):
            Own.calls += 1
            return 2 * u

        def sqrt(self, f, y):
            return 2**0.5 * torch.eye(C, dtype=f.dtype).expand(len(f), C, C)

    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    expected = truth.hessian(branches, lambda f, y: f.square().sum(), data, ["0.weight"])
    H = HessianOperator(net, Own(), data, params="0.weight")
    u = torch.randn(H.shape[0], dtype=torch.float64)
    assert error(H @ u, expected @ u) < 1e-13
    assert Own.calls == 1
    assert error(blocks(net, Own(), data, params="0.weight", which="all").dense(), expected) < 1e-13

    class Wrong(Own):
        def sqrt(self, f, y):
            return torch.eye(C)

    with pytest.raises(ValueError, match=r"loss.sqrt must return \(N=5, C=4, K\), got \(4, 4\)"):
        blocks(net, Wrong(), data, params="0.weight")


@pytest.mark.parametrize("method", ["auto", "hvp"])
def test_linear_regression_in_closed_form(method):
    net = bsfast.fuse([nn.Linear(3, 1, bias=False).double() for _ in range(2)])
    x = torch.randn(N, 3, dtype=torch.float64)
    got = blocks(net, nn.MSELoss(), (x, torch.randn(N, 1).double()), which="all", method=method)
    assert error(got.dense(), (2 / N * x.mT @ x).repeat(2, 2)) < 1e-14


@pytest.mark.parametrize("method", ["auto", "hvp"])
def test_logistic_regression_in_closed_form(method):
    net = bsfast.fuse([nn.Linear(3, 1, bias=False).double() for _ in range(2)])
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N, 1)).double()
    with torch.no_grad():
        s = torch.sigmoid(net(x))
    got = blocks(net, nn.BCEWithLogitsLoss(), (x, y), which="all", method=method)
    assert error(got.dense(), (x.mT @ (s * (1 - s) * x) / N).repeat(2, 2)) < 1e-13


@pytest.mark.parametrize("method", ["auto", "ggn", "hvp"])
def test_softmax_regression_in_closed_form(method):
    net = bsfast.fuse([nn.Linear(3, C, bias=False).double() for _ in range(2)])
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(C, (N,))
    with torch.no_grad():
        p = net(x).softmax(1)
    expected = sum(torch.kron(torch.diag(p[n]) - torch.outer(p[n], p[n]), torch.outer(x[n], x[n])) for n in range(N))
    got = blocks(net, nn.CrossEntropyLoss(), (x, y), which="all", method=method)
    assert error(got.dense(), (expected / N).repeat(2, 2)) < 1e-13


def test_toy_of_the_paper_in_closed_form():
    """Half squared errors, v_k = LeakyReLU(w_k x + b_k): H = sum_j g_j g_j^T with g = slope (x, 1)."""
    net = bsfast.fuse([nn.Sequential(nn.Linear(1, 1), nn.LeakyReLU(0.1)).double() for _ in range(3)])
    x, y = torch.tensor([[-1.0], [0], [0], [1]]).double(), torch.randn(4, 1).double()
    w, b = net.get_parameter("0.weight").detach(), net.get_parameter("0.bias").detach()
    slope = torch.where((w * x + b.unsqueeze(1)) > 0, 1.0, 0.1 * torch.ones(4, 1).double()).squeeze(-1)  # (M, 4)
    g = (slope[:, :, None] * torch.cat([x, torch.ones_like(x)], 1)).movedim(1, 0).flatten(1)  # (4, 2 M)
    got = blocks(net, lambda f, y: (f - y).square().mean() / 2, (x, y), which="all")
    assert got.exact
    assert error(got.dense(), g.mT @ g / 4) < 1e-13


def test_loss_errors():
    net, _ = truth.make(truth.relu_net, 2)
    x, y = truth.batch()
    for loss, message in [
        (nn.CrossEntropyLoss(weight=torch.ones(C)), "equal weights, got CrossEntropyLoss"),
        (nn.CrossEntropyLoss(ignore_index=1), "must count every sample, got ignore_index=1"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction 'mean' or 'sum', got 'none'"),
        (lambda f, y: f.sum(1), "must return a scalar tensor, got"),
        (nn.MSELoss(), "targets of f's shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            HessianOperator(net, loss, (x, y))
    with pytest.raises(ValueError, match="class indices of at least 0"):
        HessianOperator(net, nn.CrossEntropyLoss(), (x, y - 1 - y.min()))
    late = torch.cat([y, y, -100 * torch.ones(1).long()])  # torch would leave it out of the mean
    with pytest.raises(ValueError, match="class indices of at least 0"):
        blocks(net, nn.CrossEntropyLoss(), (torch.cat([x, x, x[:1]]), late), params="0.weight")
    with pytest.raises(TypeError, match="loss must be callable with"):
        HessianOperator(net, "ce", (x, y))
    assert isinstance(as_loss(lambda f, y: f.sum()), Loss)
