"""A branch that is itself a module with a rule runs by its rule, under its own names."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.fuse import rules
from bsfast.nn import StackedModule
from tests.fuse.same import assert_same, saved

ROOTS: dict[type[nn.Module], tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    nn.Conv2d: (lambda: nn.Conv2d(3, 4, 3), (17, 3, 5, 4)),
    nn.Linear: (lambda: nn.Linear(3, 4), (5, 3)),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(3), (5, 3)),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(3), (17, 3, 5, 4)),
    nn.BatchNorm3d: (lambda: nn.BatchNorm3d(3, momentum=None), (5, 3, 2, 3, 2)),
    nn.InstanceNorm2d: (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (5, 3, 4, 4)),
    nn.GroupNorm: (lambda: nn.GroupNorm(2, 4), (5, 4, 3)),
    nn.LayerNorm: (lambda: nn.LayerNorm((4, 3)), (5, 4, 3)),
    nn.PReLU: (lambda: nn.PReLU(3), (5, 3, 2)),
    nn.Dropout: (lambda: nn.Dropout(0.0), (5, 3)),
    nn.AlphaDropout: (lambda: nn.AlphaDropout(0.0), (5, 3)),
    nn.RReLU: (lambda: nn.RReLU(0.3, 0.3), (5, 3)),
    nn.Dropout1d: (lambda: nn.Dropout1d(0.0), (5, 3, 2)),
    nn.Dropout2d: (lambda: nn.Dropout2d(0.0), (5, 3, 2, 2)),
    nn.Dropout3d: (lambda: nn.Dropout3d(0.0), (5, 3, 2, 2, 2)),
    nn.FeatureAlphaDropout: (lambda: nn.FeatureAlphaDropout(0.0), (5, 3, 2)),
}


@pytest.fixture(autouse=True)
def _restore_rules() -> Iterator[None]:
    before = dict(rules._RULES)
    yield
    rules._RULES.clear()
    rules._RULES.update(before)


def test_every_rule_has_a_case() -> None:
    assert set(ROOTS) == set(rules._RULES)


@pytest.mark.parametrize("cls", ROOTS, ids=lambda cls: cls.__name__)
def test_ruled_root_runs_by_its_rule(cls: type[nn.Module]) -> None:
    make, shape = ROOTS[cls]
    branches = [make().double() for _ in range(3)]
    for branch in branches:
        for parameter in branch.parameters():
            nn.init.normal_(parameter)
    names = list(branches[0].state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    net = assert_same(branches, x)
    assert list(net.state_dict()) == names
    assert [(row.node, row.operation) for row in net.report().rows][1:] == [
        ("(the whole branch)", rules.find_rule(branches[0])(branches).__class__.__name__)
    ]
    for twin in (copy.deepcopy(net), saved(net), bsfast.fuse(bsfast.unfuse(net))):
        assert_same(copy.deepcopy(branches), x, net=twin)


def test_ruled_root_follows_its_tensors() -> None:
    net = bsfast.fuse([nn.BatchNorm1d(3) for _ in range(2)])
    x = torch.randn(5, 3)
    net.double()
    assert net(x.double()).dtype == torch.float64
    state = {name: torch.full_like(tensor, 2) for name, tensor in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    net.eval()
    expected = (x.double() - 2) / (2 + 1e-5) ** 0.5 * 2 + 2
    torch.testing.assert_close(net(x.double()), 2 * expected)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in net.named_parameters()}
    assert torch.func.functional_call(net, zeros, (x.double(),)).abs().max() == 0
    assert net.to("meta")(x.double().to("meta")).is_meta


def test_random_root_draws_per_branch() -> None:
    net = bsfast.fuse([nn.Dropout(0.5) for _ in range(2)])
    v = net.branch_outputs(torch.ones(100))
    assert not torch.equal(v[0], v[1])
    assert torch.equal(net.eval().branch_outputs(torch.ones(100)), torch.ones(2, 100))


class Scale(nn.Module):
    """Takes an optional argument that its fused form need not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, power: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        y = x * self.weight**power
        return y if shift is None else y + shift


class StackedScale(StackedModule):
    def forward(self, activations: Tensor, power: float = 1.0, **more: Tensor) -> Tensor:
        y = activations * self.weight[:, None] ** power
        assert more.keys() <= {"shift"}
        return y + more["shift"] if more else y


def test_registered_root_takes_what_it_is_given() -> None:
    bsfast.register_rule(Scale, StackedScale.from_branches)
    branches = [Scale() for _ in range(2)]
    net, x, shift = bsfast.fuse(branches), torch.randn(4, 3), torch.randn(4, 3)
    assert [row.operation for row in net.report(x).rows][-1] == "StackedScale"
    for rest, named in (((), {}), ((2.0,), {}), ((), {"power": 3}), ((), {"shift": shift}), ((2,), {"shift": shift})):
        want = torch.stack([branch(x, *rest, **named) for branch in branches])
        torch.testing.assert_close(net.branch_outputs(x, *rest, **named), want)


def test_ruled_root_compiles() -> None:
    torch._dynamo.reset()
    net = bsfast.fuse([nn.BatchNorm2d(3) for _ in range(2)])
    twin, x = copy.deepcopy(net), torch.randn(17, 3, 4, 4)
    got = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, twin(x))
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))
