"""``register_rule``: a user's own fused layer, and what a wrong one is told."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.fuse import rules
from bsfast.nn import StackedModule
from bsfast.reference import ReferenceBranched


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if x.sum() > -1e9 else x  # not traceable


class StackedScale(StackedModule):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None]


class Quiet(nn.Linear):
    def extra_repr(self) -> str:
        return "as its parent"


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture(autouse=True)
def _restore_rules() -> Iterator[None]:
    before = dict(rules._RULES)
    yield
    rules._RULES.clear()
    rules._RULES.update(before)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), Scale())


def test_register_rule_fuses_the_class() -> None:
    with pytest.raises(ValueError, match="control flow must not depend on data"):
        bsfast.fuse(make, num_branches=2)
    bsfast.register_rule(Scale, StackedScale.from_branches)
    branches = [make() for _ in range(2)]
    net, x = bsfast.fuse(branches), torch.randn(4, 3)
    torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))
    assert [row.operation for row in net.report().rows][-1] == "StackedScale"
    assert torch.equal(bsfast.unfuse(net)[1][1].weight, branches[1][1].weight)


BAD: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "nothing": (lambda modules: None, TypeError, "the rule of Scale must return a torch.nn.Module, got NoneType"),
    "a-branch": (lambda modules: modules[0], ValueError, "must return a new module"),
    "no-weights": (
        lambda modules: nn.Identity(),
        ValueError,
        r"must keep names and put M first, expected .*\(2, 3\).*got {}",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_fuse_refuses_a_bad_rule(name: str) -> None:
    rule, error, message = BAD[name]
    bsfast.register_rule(Scale, rule)
    with pytest.raises(error, match=message):
        bsfast.fuse(make, num_branches=2)


def test_register_rule_checks_its_arguments() -> None:
    with pytest.raises(TypeError, match=r"module must be a subclass of torch.nn.Module, got 3"):
        bsfast.register_rule(3, StackedScale.from_branches)
    with pytest.raises(TypeError, match="rule must be callable with a list of M modules, got None"):
        bsfast.register_rule(Scale, None)


def test_subclasses_that_override_forward_are_traced() -> None:
    for cls, operation in ((Quiet, "Linear"), (Doubled, "mul")):
        branches = [nn.Sequential(cls(3, 3)) for _ in range(2)]
        net, x = bsfast.fuse(branches), torch.randn(4, 3)
        torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))
        assert net.report().rows[-1].operation == operation


def test_inplace_after_an_unknown_rule_is_refused() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: Tensor) -> Tensor:
            y = self.scale(x)  # might be x itself
            y += 1
            return y + x

    bsfast.register_rule(Scale, StackedScale.from_branches)
    with pytest.raises(ValueError, match="must not write into its input"):
        bsfast.fuse(Adds, num_branches=2)
