"""Dense blocks by every method against functional autodiff, and what ``auto`` chooses and claims."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bsfast.hessian import blocks
from bsfast.reference import ReferenceBranched
from tests.hessian import truth
from tests.hessian.truth import error

EXACT = 1e-12
LAYERS = {"0.weight": "ggn", "0": "ggn", "1": "ggn", "3.0.weight": "ggn", "6": "khatri_rao", "6.weight": "khatri_rao"}
LAYERS |= {"6.bias": "khatri_rao", "8": "khatri_rao"}


def names_of(net, params):
    return [n for n, _ in net.named_parameters() if n == params or n.startswith(f"{params}.")]


@pytest.mark.parametrize(("params", "method"), LAYERS.items())
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss], ids=["ce", "mse"])
def test_auto_takes_the_exact_shortcut_of_piecewise_linear_nets(params, method, loss):
    net, branches = truth.make(truth.relu_net, 3)
    x, y = truth.batch()
    plain, data = (F.cross_entropy, (x, y)) if loss is F.cross_entropy else (truth.mse, (x, torch.randn(5, 4).double()))
    names = names_of(net, params)
    expected = truth.hessian(branches, plain, data, names)
    P = expected.shape[0] // 3
    result = blocks(net, loss, data, params=params, which="all")
    assert (result.method, result.exact) == (method, True)
    assert result.tensor.shape == (3, 3, P, P)
    assert error(result.dense(), expected) < EXACT
    own = blocks(net, loss, data, params=params)
    assert (own.method, own.exact, own.tensor.shape) == (method, True, (3, P, P))
    assert (
        error(own.dense(), torch.block_diag(*[expected[k * P : k * P + P, k * P : k * P + P] for k in range(3)]))
        < EXACT
    )
    pair = blocks(net, loss, data, params=params, which=(2, 0))
    assert error(pair.dense(), expected[2 * P :, :P]) < EXACT
    assert error(expected, truth.gauss_newton(branches, plain, data, names)) < EXACT


@pytest.mark.parametrize("method", ["ggn", "khatri_rao", "hvp", "autograd"])
def test_methods_agree(method):
    net, branches = truth.make(truth.relu_net, 2)
    x, y = truth.batch(7)
    names = ["8.bias", "8.weight"]
    expected = truth.hessian(branches, F.cross_entropy, (x, y), names)
    ragged = [(x[:4], y[:4]), (x[4:], y[4:])]
    for which in ("all", "diag", (0, 1), (1, 1)):
        result = blocks(net, nn.CrossEntropyLoss(), ragged, params=names, which=which, method=method)
        assert (result.method, result.exact) == (method, True)
        P = expected.shape[0] // 2
        parts = {
            "all": expected,
            "diag": torch.block_diag(expected[:P, :P], expected[P:, P:]),
            (0, 1): expected[:P, P:],
            (1, 1): expected[P:, P:],
        }
        assert error(result.dense(), parts[which]) < EXACT
    total = blocks(net, nn.CrossEntropyLoss(reduction="sum"), ragged, params=names, which="all", method=method)
    assert error(total.dense(), 7 * expected) < EXACT
    chunked = blocks(net, nn.CrossEntropyLoss(), (x, y), params=names, which="all", method=method, chunk_size=2)
    assert error(chunked.dense(), expected) < EXACT


def test_auto_mixes_methods_where_only_blocks_of_two_branches_are_gauss_newton():
    net, branches = truth.make(lambda: truth.between(nn.Tanh(), width=2), 2)
    data = truth.batch()
    expected = truth.hessian(branches, F.cross_entropy, data, ["0.weight"])
    result = blocks(net, F.cross_entropy, data, params="0.weight", which="all")
    assert (result.method, result.exact) == ("ggn+hvp", True)
    assert "tanh" in result.why
    assert error(result.dense(), expected) < EXACT
    assert blocks(net, F.cross_entropy, data, params="0.weight").method == "hvp"
    assert blocks(net, F.cross_entropy, data, params="0.weight", which=(0, 1)).method == "ggn"
    forced = blocks(net, F.cross_entropy, data, params="0.weight", method="ggn")
    assert not forced.exact
    assert error(forced.dense(), truth.block_diagonal(expected, [slice(0, 36), slice(36, 72)])) > 1e-3


def test_several_layers_are_not_one():
    net, branches = truth.make(truth.relu_net, 2)
    data, names = truth.batch(), ["0.bias", "1.weight"]
    expected = truth.hessian(branches, F.cross_entropy, data, names)
    result = blocks(net, F.cross_entropy, data, params=names, which="all")
    assert result.method == "ggn+hvp"
    assert "several layers" in result.why
    assert error(result.dense(), expected) < EXACT
    assert error(truth.gauss_newton(branches, F.cross_entropy, data, names), expected) > 1e-3


def test_the_reference_takes_the_slow_exact_way():
    _, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    net = ReferenceBranched(branches)
    result = blocks(net, F.cross_entropy, data, params="1", which="all")
    assert result.method == "hvp"
    assert "no traced graph" in result.why
    assert error(result.dense(), truth.hessian(branches, F.cross_entropy, data, ["1.weight", "1.bias"])) < EXACT
    with pytest.raises(ValueError, match=r"must be 'auto', 'hvp' or 'autograd' here, got 'ggn': .*no traced graph"):
        blocks(net, F.cross_entropy, data, params="1", method="ggn")


class Settings(nn.Module):
    """Every layer with per-sample gradients, in unusual settings."""

    def __init__(self, last=lambda y: y):
        super().__init__()
        self.grouped = nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2)
        self.reflect = nn.Conv2d(4, 2, (1, 2), padding=(0, 1), padding_mode="reflect", bias=False)
        self.same = nn.Conv2d(2, 2, (3, 1), padding="same")
        self.prelu = nn.PReLU(2)
        self.slope = nn.PReLU()
        self.rows = nn.Linear(3, 2)
        self.out = nn.Linear(8, 4)
        self.last = last

    def forward(self, x):
        y = F.relu6(self.reflect(self.grouped(x)) + 0.5) / 2 - 0.2
        y = self.slope(F.pad(self.prelu(4 * self.same(y) - 1), (0, 0, 1, 1)) - 0.1)
        y = F.interpolate(self.rows(y), size=(1, 2), mode="bilinear")
        return self.out(self.last(torch.cat([y, -y * 0.5], 1).unsqueeze(1).flatten(1)))


def test_settings_of_layers():
    data = truth.batch(3)
    net, branches = truth.make(Settings, 2)
    for params in ("grouped", "reflect", "same", "prelu", "slope", "rows", "out"):
        names = names_of(net, params)
        result = blocks(net, F.cross_entropy, data, params=params, which="all")
        assert result.method == ("khatri_rao" if params == "out" else "ggn"), result.why
        assert error(result.dense(), truth.hessian(branches, F.cross_entropy, data, names)) < EXACT
    for last in (lambda y: y[:, :], lambda y: y.repeat(1, 1), lambda y: y.clone()):  # not in the table
        other, _ = truth.make(lambda last=last: Settings(last), 2)
        assert blocks(other, F.cross_entropy, data, params="slope").method == "hvp"


def test_many_chunks_of_float32_are_added_in_float64(monkeypatch):
    net, branches = truth.make(truth.relu_net, 2)
    x, y = truth.batch(40)
    expected = truth.hessian(branches, F.cross_entropy, (x, y), ["8.weight", "8.bias"])
    monkeypatch.setattr("bsfast.hessian.gauss_newton.MOST_COLUMNS", 10)
    for method in ("ggn", "khatri_rao"):
        result = blocks(
            net.float(), F.cross_entropy, (x.float(), y), params="8", which="all", method=method, chunk_size=3
        )
        assert result.tensor.dtype == torch.float32
        assert error(result.dense(), expected) < 1e-6


def test_blocks_errors():
    net, _ = truth.make(truth.relu_net, 2)
    data = truth.batch()
    for arguments, message in [
        ({"which": "none"}, "which must be 'diag', 'all' or a pair of branches below M=2, got 'none'"),
        ({"which": (0, 2)}, "pair of branches below M=2"),
        ({"which": [0, 1]}, r"pair of branches below M=2, got \[0, 1\]"),
        (
            {"which": "all", "params": "0", "max_bytes": 2**10},
            "at most max_bytes=9.54e-07 GiB, got 4.3e-05 GiB for "
            "branches of 38 parameters; choose fewer params, such as one layer, or products",
        ),
        ({"method": "kfac"}, "method must be one of"),
        ({"params": "0", "method": "khatri_rao"}, "got 'khatri_rao': the layer is not linear on one vector a sample"),
        ({"params": "stem"}, "params must name parameters or modules of a branch, got 'stem'; there are 0.weight"),
    ]:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            blocks(net, F.cross_entropy, data, **arguments)


def test_images_as_outputs_take_products():
    net, branches = truth.make(lambda: nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU()).eval(), 2)
    x, _ = truth.batch()
    target = torch.randn(5, 2, truth.SIZE, truth.SIZE, dtype=torch.float64)
    result = blocks(net, nn.MSELoss(), (x, target), which="all")
    assert (result.method, result.why) == ("hvp", "C=32 columns are more work than P=4 products")
    expected = truth.hessian(branches, truth.mse, (x, target))
    assert error(result.dense(), expected) < EXACT
    assert error(blocks(net, nn.MSELoss(), (x, target), which="all", method="ggn").dense(), expected) < EXACT
