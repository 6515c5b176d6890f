"""Derivatives passed through folded kernels, and what is kept between products: against autodiff of plain modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bsfast
from bsfast.hessian import HessianOperator, blocks, eigsh
from bsfast.ops.backend import native_why_not
from bsfast.reference import ReferenceBranched
from experiments.classifier.model import make_branch
from tests.hessian import truth
from tests.hessian.truth import error

EXACT = 1e-12
pytestmark = pytest.mark.skipif(native_why_not("cpu") is not None, reason=f"no own kernels: {native_why_not('cpu')}")


class Block(nn.Module):
    """A residual block as of ResNet; with stride 2 its shortcut is a convolution, too."""

    def __init__(self, channels: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=bias)
        self.bn1 = truth.BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn2 = truth.BatchNorm(channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1, stride), truth.BatchNorm(channels))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class TwoUsers(nn.Module):
    """A ReLU's value goes to a convolution, to a pool and, unchanged, to a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.linear = nn.Linear(12, truth.CLASSES)

    def forward(self, x):
        y = F.relu(self.conv1(x))
        pooled = F.max_pool2d(y, 2)
        z = F.relu(self.conv2(y) + y)
        return self.linear((F.avg_pool2d(z, 2) + torch.tanh(pooled)).flatten(1))


class Halves(nn.Module):
    """A step whose value is two tensors, and a branch of the graph that ends nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = truth.BatchNorm(4)
        self.unused = nn.Conv2d(4, 1, 1)
        self.linear = nn.Linear(2 * truth.SIZE**2, truth.CLASSES)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        self.unused(y)
        a, b = torch.chunk(y, 2, 1)
        return self.linear((a * b).flatten(1))


def resnet(bias: bool = False):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), truth.BatchNorm(3), nn.ReLU(), Block(3, 1, bias), Block(3, 2, bias),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, truth.CLASSES),
    ).eval()  # fmt: skip


NETS = {
    "resnet": resnet,
    "resnet-with-biases": lambda: resnet(True),
    "two-users": lambda: TwoUsers().eval(),
    "halves": lambda: Halves().eval(),
    "tanh": lambda: nn.Sequential(resnet()[:4], nn.Tanh(), resnet()[3:]).eval(),
    "no-affine": lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)
    ).eval(),
}


@pytest.mark.parametrize("name", NETS)
def test_products_through_folded_kernels(name):
    net, branches = truth.make(NETS[name], 2)
    data = truth.batch(7)
    assert net.curvature_sweep(list(net.parameters()), data[0]) is not None
    H = HessianOperator(net, F.cross_entropy, data, chunk_size=4)
    full = truth.hessian(branches, F.cross_entropy, data)
    ggn = truth.gauss_newton(branches, F.cross_entropy, data)
    own = truth.block_diagonal(full, H.parameters.slices())
    V = torch.randn(H.shape[0], 2, dtype=torch.float64)
    for _ in range(2):  # the second time with what was kept
        assert error(H @ V, full @ V) < EXACT
        assert error(H.variant(coupling="block_diag") @ V, own @ V) < EXACT
        assert error(H.variant(coupling="cross") @ V, (full - own) @ V) < EXACT
        assert error(H.variant(kind="ggn") @ V, ggn @ V) < EXACT
        assert error(H.variant(kind="residual") @ V, (full - ggn) @ V) < EXACT


@pytest.mark.parametrize("params", ["0.weight", "1.weight", "1", "3.conv2", "4.shortcut", "4.bn2.bias", "7"])
def test_products_of_some_parameters_through_folded_kernels(params):
    net, branches = truth.make(lambda: resnet(True), 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data, params=params)
    expected = truth.hessian(branches, F.cross_entropy, data, H.parameters.names)
    assert error(H.to_dense(), expected) < EXACT
    result = blocks(net, F.cross_entropy, data, params=params, which="all")
    assert error(result.dense(), expected) < EXACT


@pytest.mark.parametrize("params", ["0.weight", "0.bias", "3.conv1.weight", "3.conv2", "4.conv1", "4.shortcut.0"])
def test_columns_through_folded_kernels(params):
    net, branches = truth.make(lambda: resnet(True), 3)
    data = truth.batch()
    result = blocks(net, F.cross_entropy, data, params=params, which="all")
    assert (result.method, result.exact) == ("ggn", True)
    names = [n for n, _ in net.named_parameters() if n == params or n.startswith(f"{params}.")]
    assert error(result.dense(), truth.hessian(branches, F.cross_entropy, data, names)) < EXACT


@pytest.mark.parametrize("what", ["parameter", "parameter-data", "buffer", "input", "target"])
def test_what_is_kept_is_renewed_when_anything_changes(what):
    net, _ = truth.make(resnet, 2)
    x, y = truth.batch()
    H = HessianOperator(net, F.cross_entropy, (x, y))
    u = torch.randn(H.shape[0], dtype=torch.float64)
    before = H @ u
    changes = {
        "parameter": lambda: net.get_parameter("3.conv1.weight")[0].mul_(1.1),
        "parameter-data": lambda: net.get_parameter("3.conv1.weight").data[0].mul_(1.1),
        "buffer": lambda: net.get_buffer("1.running_mean").add_(0.1),
        "input": lambda: x.mul_(1.1),
        "target": lambda: y.copy_((y + 1) % truth.CLASSES),
    }
    with torch.no_grad():
        changes[what]()
    expected = truth.hessian(bsfast.unfuse(net), F.cross_entropy, (x, y)) @ u
    assert error(before, expected) > 1e-3
    assert error(H @ u, expected) < EXACT


def test_what_is_kept_follows_the_mode():
    net, _ = truth.make(resnet, 2)
    x, y = truth.batch()
    H = HessianOperator(net, F.cross_entropy, (x, y), chunk_size=None, check_deterministic=False)
    u = torch.randn(H.shape[0], dtype=torch.float64)
    evaluated = H @ u
    assert error(copy.copy(H) @ u, evaluated) < 1e-14
    net.train()
    branches = [b.train() for b in bsfast.unfuse(net)]
    for branch in branches:
        for module in branch.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                module.num_batches_tracked = None
    assert error(H @ u, truth.hessian(branches, F.cross_entropy, (x, y)) @ u) < EXACT
    net.eval()
    assert error(H @ u, evaluated) < 1e-14


def test_nothing_is_kept_beyond_the_bound(monkeypatch):
    net, _ = truth.make(resnet, 2)
    x, y = truth.batch(8)
    made = []
    own = type(net).curvature_sweep
    monkeypatch.setattr(type(net), "curvature_sweep", lambda self, *args: made.append(1) or own(self, *args))
    results = []
    for limit, expected in ((0, 4), (2**30, 2)):  # sweeps of two chunks in two products
        made.clear()
        H = HessianOperator(net, F.cross_entropy, (x, y), chunk_size=4, max_kept_bytes=limit)
        results += [H @ torch.ones(H.shape[0]).double() for _ in range(2)]
        assert len(made) == expected
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_sweep_where_nothing_is_won():
    x, _ = truth.batch()
    smooth, _ = truth.make(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.Tanh()).eval(), 2)
    assert smooth.curvature_sweep(list(smooth.parameters()), x) is None
    training, _ = truth.make(resnet, 2)
    assert training.train().curvature_sweep(list(training.parameters()), x) is None
    dropout, _ = truth.make(lambda: nn.Sequential(resnet(), nn.Dropout()).eval(), 2)
    H = HessianOperator(dropout, F.cross_entropy, truth.batch())
    assert (H @ torch.ones(H.shape[0]).double()).isfinite().all()


def test_hooks_of_layers_are_called():
    net, branches = truth.make(resnet, 2)
    x, y = truth.batch()
    seen = []
    handle = net.get_submodule("3.conv1").register_forward_hook(lambda *args: seen.append(1))
    H = HessianOperator(net, F.cross_entropy, (x, y))
    u = torch.randn(H.shape[0], dtype=torch.float64)
    assert error(H @ u, truth.hessian(branches, F.cross_entropy, (x, y)) @ u) < EXACT
    assert seen
    handle.remove()


class Convolutions(TorchDispatchMode):
    """How many convolutions and gradients of convolutions run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().startswith("bsfast::conv2d") and function.name().endswith("_out")
        return function(*args, **(kwargs or {}))


def test_all_blocks_cost_one_product_and_what_is_kept_is_not_computed_again():
    net, _ = truth.make(resnet, 3)
    H = HessianOperator(net, F.cross_entropy, truth.batch())
    u = torch.ones(H.shape[0], dtype=torch.float64)
    H @ u
    counts = {}
    for coupling in ("full", "block_diag"):
        with Convolutions() as seen:
            H.variant(coupling=coupling) @ u
        counts[coupling] = seen.count
    # Six convolutions, but of the first, whose input is constant: 2.
    assert counts == dict.fromkeys(counts, 6 * 5 + 2)
    with Convolutions() as seen:
        eigsh(H.variant(coupling="block_diag"), 2, max_iter=8)
    assert seen.count <= 8 * counts["full"]


class Signs(TorchFunctionMode):
    """Which samples' ReLUs were on, of every call, ``(N, elements)``."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.relu:
            self.found.append((args[0] > 0).flatten(1))
        return function(*args, **(kwargs or {}))


def signs(branches, x):
    with Signs() as mode, torch.no_grad():
        for branch in branches:
            branch(x)
    return torch.cat(mode.found, 1)


def test_float32_of_samples_whose_relus_decide_as_in_float64():
    torch.manual_seed(5)
    net, branches = truth.make(lambda: make_branch((8, 8, 8, 8), truth.CLASSES).eval(), 2)
    x, y = torch.randn(24, 3, 32, 32, dtype=torch.float64), torch.randint(truth.CLASSES, (24,))
    single = [copy.deepcopy(branch).float() for branch in branches]
    same = (signs(branches, x) == signs(single, x.float())).all(1)
    assert same.sum() > 8
    some = x[same], y[same]
    expected = blocks(net, F.cross_entropy, some, params="conv1.weight", which="all", method="ggn").dense()
    columns = HessianOperator(ReferenceBranched(branches), F.cross_entropy, some, params="conv1.weight")
    unit = torch.eye(len(expected), dtype=torch.float64)[:, [3, 300]]
    assert error(expected @ unit, columns @ unit) < 1e-9
    got = blocks(net.float(), F.cross_entropy, (some[0].float(), some[1]), params="conv1.weight", which="all")
    assert (got.method, got.tensor.dtype) == ("ggn", torch.float32)
    assert error(got.dense(), expected) < 1e-5
    whole = blocks(net.double(), F.cross_entropy, (x, y), params="conv1.weight", which="all").dense()
    flipped = blocks(net.float(), F.cross_entropy, (x.float(), y), params="conv1.weight", which="all").dense()
    assert error(flipped, whole) < 5e-3
    u = torch.randn(2, sum(own[0].numel() for own in net.parameters()))
    single_data = some[0].float(), some[1]
    product = HessianOperator(net.float(), F.cross_entropy, single_data, coupling="block_diag") @ u
    exact = HessianOperator(net.double(), F.cross_entropy, some, coupling="block_diag") @ u.double()
    assert error(product, exact) < 1e-4


def test_an_unused_convolution_is_no_chain():
    net, branches = truth.make(lambda: Halves().eval(), 2)
    x, _ = truth.batch()
    torch.testing.assert_close(net.branch_outputs(x), torch.stack([branch(x) for branch in branches]))


def test_networks_without_joined_steps_run_no_sweep(monkeypatch):
    net, _ = truth.make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval(), 2)
    monkeypatch.setattr("bsfast.fuse.branched.CurvatureSweep", None)
    assert net.curvature_sweep(list(net.parameters()), torch.randn(5, 3, dtype=torch.float64)) is None
