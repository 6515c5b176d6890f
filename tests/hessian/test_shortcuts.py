"""Negative controls: nets whose Hessian is not its Gauss-Newton term; ``auto`` must not take the shortcut."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsfast.hessian import blocks
from tests.hessian import truth
from tests.hessian.truth import Apply, error


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.gate = nn.Conv2d(2, 2, 1)
        self.linear = nn.Linear(2 * truth.SIZE**2, truth.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.linear((y * torch.sigmoid(self.gate(y))).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.linear = nn.Linear(2, truth.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).flatten(2).movedim(1, -1)
        return self.linear(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


class DotAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).flatten(2)
        return self.linear((rows @ torch.softmax(rows.mT @ rows, -2)).mean(2))


class Tied(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.linear = nn.Linear(2 * truth.SIZE**2, truth.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(F.relu(self.conv(x))).flatten(1))


class Penalised(Tied):
    """The weight is read a second time, outside its layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.conv(x)).flatten(1) * self.conv.weight.square().mean())


NETS = {
    "batchnorm-train": lambda: truth.between(truth.BatchNorm(2, train=True)),
    "instancenorm": lambda: truth.between(nn.InstanceNorm2d(2, affine=True)),
    "groupnorm": lambda: truth.between(nn.GroupNorm(1, 2)),
    "layernorm": lambda: truth.between(nn.LayerNorm([2, truth.SIZE, truth.SIZE])),
    "square": lambda: truth.between(Apply(lambda y: y * y)),
    "square-by-power": lambda: truth.between(Apply(lambda y: y**2)),
    "product-with-shift": lambda: truth.between(Apply(lambda y: y * torch.roll(y, 1, 0))),
    "gate": Gate,
    "silu": lambda: truth.between(nn.SiLU()),
    "hardswish": lambda: truth.between(nn.Hardswish()),
    "tanh": lambda: truth.between(nn.Tanh()),
    "gelu": lambda: truth.between(nn.GELU()),
    "softmax": lambda: truth.between(nn.Softmax(1)),
    "attention-module": Attention,
    "attention": DotAttention,
    "tied-module": Tied,
    "tied-weight": lambda: nn.Sequential(truth.Twice(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, truth.CLASSES)),
    "read-twice": Penalised,
    "division": lambda: truth.between(Apply(lambda y: y / (1 + y.abs()))),
    "mean-removed-product": lambda: truth.between(Apply(lambda y: y * y.mean((2, 3), keepdim=True))),
    "lp-pool": lambda: truth.between(nn.LPPool2d(2, 2), nn.Upsample(scale_factor=2)),
    "softplus-late": lambda: nn.Sequential(truth.between(), nn.Softplus()),
}


@pytest.mark.filterwarnings("ignore:bsfast")
@pytest.mark.parametrize("name", NETS)
def test_auto_never_takes_a_wrong_shortcut(name):
    net, branches = truth.make(NETS[name], 2)
    data = truth.batch()
    params = next(n for n, p in net.named_parameters() if p.dim() == 5)
    expected = truth.hessian(branches, F.cross_entropy, data, [params], reverse=True)
    P = expected.shape[0] // 2
    own = [slice(0, P), slice(P, 2 * P)]
    ggn = truth.block_diagonal(truth.gauss_newton(branches, F.cross_entropy, data, [params]), own)
    assert error(ggn, truth.block_diagonal(expected, own)) > 1e-3  # the control is one
    result = blocks(net, F.cross_entropy, data, params=params, which="all")
    assert result.method in {"hvp", "ggn+hvp"}
    assert error(result.dense(), expected) < 1e-12
    assert blocks(net, F.cross_entropy, data, params=params).method == "hvp"


def test_weight_with_the_scale_of_the_next_normalisation_is_not_gauss_newton():
    net, branches = truth.make(truth.relu_net, 2)
    data, names = truth.batch(), ["0.weight", "1.weight"]
    expected = truth.hessian(branches, F.cross_entropy, data, names)
    assert error(truth.gauss_newton(branches, F.cross_entropy, data, names), expected) > 1e-2
    result = blocks(net, F.cross_entropy, data, params=names)
    assert result.method == "hvp"
    assert error(result.dense(), truth.block_diagonal(expected, [slice(0, 38), slice(38, 76)])) < 1e-12


EXACT_NETS = {
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),
    "prelu": nn.PReLU,
    "identity": nn.Identity,
    "adaptive-pool": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Upsample(scale_factor=2)),
    "max-pool": lambda: nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.Upsample(size=(4, 4), mode="bilinear")),
    "zero-pad": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 0, 0)), nn.Conv2d(2, 2, (1, 2))),
    "scaled-by-the-input": lambda: Apply(lambda y: 0.5 * y + 1),
    "batchnorm": lambda: truth.BatchNorm(2),
}


@pytest.mark.parametrize("name", EXACT_NETS)
def test_auto_takes_the_shortcut_where_it_is_exact(name):
    net, branches = truth.make(lambda: truth.between(EXACT_NETS[name]()), 2)
    data = truth.batch()
    result = blocks(net, F.cross_entropy, data, params="0.weight", which="all")
    assert (result.method, result.exact) == ("ggn", True)
    assert error(result.dense(), truth.hessian(branches, F.cross_entropy, data, ["0.weight"])) < 1e-12


class Mixing(nn.Module):
    """Linear, but samples do not stay apart."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.linear(x))


MIXES = {
    "reshape": lambda y: y.mT.reshape(2, -1).mT.reshape(-1, 4),
    "transpose": lambda y: y.mT.reshape(-1, 4),
    "mean-over-samples": lambda y: y + y.mean(0, keepdim=True),
    "cat-of-samples": lambda y: torch.cat([y[3:], y[:3]]),
    "flip": lambda y: y.flip(0),
    "cumsum": lambda y: y.cumsum(0),
}


def test_samples_that_a_later_layer_mixes():
    """Every step is in the table, but the second layer reads two samples at once."""

    class Pairs(Mixing):
        def __init__(self) -> None:
            super().__init__(None)
            self.pairs = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.pairs(F.relu(self.linear(x)).reshape(-1, 8)).reshape(-1, 4)

    net, branches = truth.make(Pairs, 2)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(4, (6,))
    result = blocks(net, F.cross_entropy, (x, y), params="linear", which="all")
    assert result.method == "hvp"
    names = ["linear.weight", "linear.bias"]
    assert error(result.dense(), truth.hessian(branches, F.cross_entropy, (x, y), names)) < 1e-12


def test_a_batch_that_cannot_be_cut_apart():
    """A net made for batches of one size."""
    net, branches = truth.make(lambda: Mixing(lambda y: y.reshape(2, 6, 4).sum(0).repeat(2, 1)), 2)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randint(4, (12,))
    result = blocks(net, F.cross_entropy, (x, y), which="all")
    assert result.method == "hvp"
    assert error(result.dense(), truth.hessian(branches, F.cross_entropy, (x, y))) < 1e-12


@pytest.mark.parametrize("name", MIXES)
def test_samples_that_do_not_stay_apart(name):
    net, branches = truth.make(lambda: Mixing(MIXES[name]), 2)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(4, (6,))
    result = blocks(net, F.cross_entropy, (x, y), which="all", chunk_size=None)
    assert result.method == "hvp"
    assert error(result.dense(), truth.hessian(branches, F.cross_entropy, (x, y))) < 1e-12
