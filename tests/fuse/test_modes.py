"""``train`` and ``eval`` of a fused network do what those of its branches do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast
import bsfast.nn as bnn
from bsfast.fuse import rules
from bsfast.fuse.program import layer_at
from tests.fuse.same import assert_same, saved


class FrozenNorm(nn.Module):
    """A BatchNorm that stays in evaluation, as in detectors."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3, affine=affine)
        nn.init.uniform_(self.bn.running_mean)

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x))


class FrozenPart(nn.Module):
    """Its traced-through part stays in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = nn.Sequential(nn.Linear(3, 3), Doubles()), nn.BatchNorm1d(3)

    def train(self, mode: bool = True) -> "FrozenPart":
        super().train(mode)
        self.part.train(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x))


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.training else x


class FrozenByShape(FrozenNorm):
    """Runs by vmap."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else x


class AlwaysFrozen(FrozenNorm):
    def train(self, _: bool = True) -> "AlwaysFrozen":
        return super().train(False)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "root": FrozenNorm,
    "inner": lambda: nn.Sequential(nn.Linear(3, 3), FrozenNorm()),
    "part": FrozenPart,
    "vmap": lambda: nn.Sequential(nn.Linear(3, 3), FrozenByShape()),
    "vmap-root": FrozenByShape,
    "always": AlwaysFrozen,
}


@pytest.mark.parametrize("name", MAKERS)
def test_overridden_train_is_heard(name: str) -> None:
    branches = [MAKERS[name]().double().train() for _ in range(3)]
    net = assert_same(branches, torch.randn(5, 3, dtype=torch.float64))
    for twin in (copy.deepcopy(net), saved(net)):
        assert_same(copy.deepcopy(branches), torch.randn(5, 3, dtype=torch.float64), net=twin)


def test_overridden_train_of_an_inner_module_is_heard() -> None:
    net = bsfast.fuse([nn.Sequential(nn.Linear(3, 3), FrozenNorm()) for _ in range(2)])
    net.get_submodule("1").train()
    assert (net.get_submodule("1").training, net.get_submodule("1.bn").training) == (True, False)
    net.get_submodule("1").eval()
    assert not net.get_submodule("1.linear").training


def test_train_of_a_rules_layer_is_called() -> None:
    class Switch(bnn.Linear):
        def train(self, mode: bool = True) -> "Switch":
            self.calls = [*getattr(self, "calls", []), mode]
            return super().train(mode)

    class Root(nn.Linear):
        pass

    register = dict(rules._RULES)
    bsfast.register_rule(Root, Switch.from_branches)
    try:
        for net, path in ((bsfast.fuse([nn.Sequential(Root(3, 3))]), "0"), (bsfast.fuse([Root(3, 3)]), "")):
            layer: Any = layer_at(net, path)
            layer.calls = []
            net.eval()
            net.train()
            assert layer.calls == [False, True]
            assert layer.training
    finally:
        rules._RULES.clear()
        rules._RULES.update(register)


class Merges(FrozenNorm):
    merged = False

    def train(self, mode: bool = True) -> "Merges":
        self.merged = not mode
        return super().train(mode)


class Freezes(FrozenNorm):
    def train(self, mode: bool = True) -> "Freezes":
        self.bn.weight.requires_grad_(not mode)
        return super().train(mode)


class Scales(FrozenNorm):
    def train(self, mode: bool = True) -> "Scales":
        with torch.no_grad():
            self.bn.weight.mul_(2)
        return super().train(mode)


class OwnEval(FrozenNorm):
    def eval(self) -> "OwnEval":
        return self


class ByIndex(FrozenNorm):
    frozen = True

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(mode) if self.frozen else nn.Module.train(self, mode)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Merges, r"train\(\) must change modes only, got a change of the attribute 'merged' of '1'"),
        (Freezes, r"train\(\) must change modes only, got a change of '1.bn.weight'"),
        (Scales, r"train\(\) must change modes only, got a change of '1.bn.weight'"),
        (OwnEval, "eval must be that of torch.nn.Module, got one of its own on OwnEval '1' of branch 0"),
    ],
)
def test_train_that_does_more_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bsfast.fuse([nn.Sequential(nn.Linear(3, 3), make()) for _ in range(2)])


def test_train_must_do_the_same_in_all_branches() -> None:
    branches = [ByIndex().train() for _ in range(2)]
    branches[1].frozen = False
    for branch in branches:
        branch.bn.train()
    with pytest.raises(ValueError, match=r"train\(True\) must set the same modes.* training=False at 'bn' in branch 0"):
        bsfast.fuse(branches)
    net: Any = nn.Linear(3, 3)
    net.train = lambda _=True: net
    with pytest.raises(ValueError, match="train must be a method of the class, got one set on the instance Linear '0'"):
        bsfast.fuse([nn.Sequential(net)])
