"""Against curvlinops, another library for the same matrices; skipped where it is not installed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bsfast.hessian import HessianOperator
from bsfast.reference import ReferenceBranched
from tests.hessian import truth
from tests.hessian.truth import error

curvlinops = pytest.importorskip("curvlinops")


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss])
def test_products_agree_with_curvlinops(kind, reduction, loss):
    net, branches = truth.make(lambda: truth.tanh_net(train=False), 2)
    x, y = truth.batch(7)
    y = y if loss is nn.CrossEntropyLoss else torch.randn(7, 4).double()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    reference = ReferenceBranched(branches)
    parameters = list(reference.parameters())
    cls = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}[kind]
    theirs = cls(reference, loss(reduction=reduction), parameters, data)
    ours = HessianOperator(net, loss(reduction=reduction), data, kind=kind)
    V = torch.randn(ours.shape[0], 2, dtype=torch.float64)
    assert error(ours @ V, theirs @ V) < 1e-12


def test_the_surrogate_gives_the_block_diagonal():
    net, branches = truth.make(lambda: truth.tanh_net(train=False), 2)
    x, y = truth.batch()

    class Surrogate(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(branches)

        def forward(self, x):
            vs = torch.stack([b(x) for b in self.branches])
            return (vs + (vs.sum(0) - vs).detach()).movedim(0, 1).flatten(0, 1)  # N M rows of logits

    model = Surrogate()
    loss = nn.CrossEntropyLoss(reduction="sum")
    theirs = curvlinops.HessianLinearOperator(model, loss, list(model.parameters()), [(x, y.repeat_interleave(2))])
    ours = HessianOperator(net, loss, (x, y), coupling="block_diag")
    u = torch.randn(ours.shape[0], dtype=torch.float64)
    assert error(ours @ u, theirs @ u) < 1e-12
    assert error(HessianOperator(net, F.cross_entropy, (x, y), coupling="block_diag") @ u, theirs @ u / 5) < 1e-12
