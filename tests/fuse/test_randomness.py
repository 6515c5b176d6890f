"""Random numbers are drawn for each branch by itself, also where the branches share the input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bsfast

N = 4096


class Draw(nn.Module):
    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(x)


CODES: dict[str, Callable[[Any], Tensor]] = {
    "functional": lambda x: F.dropout(x, 0.25),
    "inplace": lambda x: F.dropout(x * 1, 0.25, True, True),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.75)) * x / 0.75,
    "rand-like": lambda x: (torch.rand_like(x) < 0.75).to(x.dtype) * x / 0.75,
    "uniform_": lambda x: (torch.empty_like(x).uniform_() < 0.75).to(x.dtype) * x / 0.75,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.Dropout(0.25),
    "module-inplace": lambda: nn.Sequential(nn.LeakyReLU(), nn.Dropout(0.25, inplace=True)),
    **{name: (lambda code=code: Draw(code)) for name, code in CODES.items()},
}


def assert_independent(v: Tensor) -> None:
    """Masks of M branches: kept with probability 3/4 each, all pairs uncorrelated, within 5 standard deviations."""
    kept = (v != 0).double().flatten(1)
    deviation = (0.75 * 0.25 / kept.shape[1]) ** 0.5
    assert (kept.mean(1) - 0.75).abs().max() < 5 * deviation
    correlation = torch.corrcoef(kept) - torch.eye(len(kept))
    assert correlation.abs().max() < 5 / kept.shape[1] ** 0.5
    torch.testing.assert_close(v[v != 0], torch.full_like(v[v != 0], 4 / 3))


@pytest.mark.parametrize("per_branch", [False, True], ids=["shared", "per-branch"])
@pytest.mark.parametrize("name", MODULES)
def test_dropout_is_independent_per_branch(name: str, per_branch: bool) -> None:
    net = bsfast.fuse(lambda: nn.Sequential(MODULES[name]()), num_branches=4)
    x = torch.ones(4, N, 1) if per_branch else torch.ones(N, 1)
    v = net.branch_outputs(x, per_branch=per_branch)
    assert_independent(v)
    assert not torch.equal(v, net.branch_outputs(x, per_branch=per_branch))
    assert x.min() == 1  # never in place


def test_noise_of_a_given_shape_is_independent_by_vmap() -> None:
    with pytest.warns(UserWarning, match="runs as torch.vmap"):
        net = bsfast.fuse(lambda: Draw(lambda x: (torch.rand(x.size(0), 1) < 0.75) * x / 0.75), num_branches=4)
    assert_independent(net.branch_outputs(torch.ones(N, 1)))


DRAWS: dict[str, Callable[[Any], Any]] = {
    "binomial": lambda x: torch.binomial(8 * x, torch.full_like(x, 0.5)),
    "native-dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "fractional-pool": lambda x: F.fractional_max_pool2d(x.cumsum(-1), 2, 4),
    "fractional-pool-with-indices": lambda x: F.fractional_max_pool2d(x.cumsum(-1), 2, 4, return_indices=True)[0],
    "fractional-pool-itself": lambda x: F.fractional_max_pool2d_with_indices(x.cumsum(-1), 2, 4)[0],
    "gumbel": lambda x: F.gumbel_softmax(x),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, of vmap
def test_every_branch_draws_its_own_on_a_shared_input(name: str) -> None:
    net = bsfast.fuse(lambda: Draw(DRAWS[name]), num_branches=2)
    first, second = net.branch_outputs(torch.ones(3, 8, 9, 9))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("cls", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
@pytest.mark.parametrize("samples", [8, 1024])
def test_channel_dropout_drops_whole_channels(cls: type[nn.Module], samples: int) -> None:
    space = (3,) * int(cls.__name__[-2])
    net = bsfast.fuse(lambda: nn.Sequential(cls(0.25)), num_branches=3)
    v = net.branch_outputs(torch.ones(samples, 4, *space)).flatten(3)
    assert torch.equal(v.amax(-1), v.amin(-1))
    assert_independent(v[..., 0]) if samples > 8 else None


def test_dropout_can_be_switched_in_an_eval_network() -> None:
    net = bsfast.fuse(lambda: nn.Sequential(nn.Linear(3, 50), nn.Dropout(), nn.Linear(50, 2)), num_branches=2).eval()
    x = torch.randn(4, 3)
    assert torch.equal(net(x), net(x))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(net(x), net(x))
    assert bsfast.unfuse(net)[0][1].training


def test_a_seed_repeats_the_run() -> None:
    net = bsfast.fuse(lambda: nn.Sequential(nn.Linear(3, 50), nn.Dropout()), num_branches=2)
    x, results = torch.randn(4, 3), []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(net(x))
    assert torch.equal(*results)


def test_fresh_branches_are_initialised_as_by_hand() -> None:
    torch.manual_seed(5)
    net = bsfast.fuse(lambda: nn.Linear(3, 3), num_branches=3)
    torch.manual_seed(5)
    assert torch.equal(net.weight, torch.stack([nn.Linear(3, 3).weight for _ in range(3)]))
