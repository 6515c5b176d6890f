"""Tracing is honest: what a fused network cannot do is refused by name."""

import random
from collections import OrderedDict
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched
from tests.fuse.forward_code import Forward, fuse_code


def _counts(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.linear(x)


def _remembers(m: Any, x: Tensor) -> Tensor:
    m.last = m.linear(x)
    return m.last


def _appends(m: Any, x: Tensor) -> Tensor:
    m.history.append(1)
    return m.linear(x)


def _loops(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    while y.sum() > 1:
        y = y / 2
    return y


def _writes_view(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    first = y[:, 0]
    first.add_(1)
    return y


def _writes_alias(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    z = +y  # torch returns y itself
    z.add_(1)
    return y


REFUSED = {
    "if-data": (lambda m, x: m.linear(x) if x.sum() > 0 else x, "control flow must not depend on data.*'gt'"),
    "while-data": (_loops, "control flow must not depend on data"),
    "python-counter": (_counts, "must not change Python attributes, got a change of 'calls'"),
    "python-tensor": (_remembers, "must not change Python attributes, got a change of 'last'"),
    "python-list": (_appends, "must not change Python attributes, got a change of 'history'"),
    "frozen-noise": (lambda m, x: m.linear(x) + torch.randn(3), "depends on no input and would be frozen"),
    "python-noise": (lambda m, x: m.linear(x) + random.random(), "depends on no input and would be frozen"),
    "write-input": (
        lambda m, x: m.linear(x.mul_(2)),
        "must not write into its input, got in-place 'mul_' on input 'x'",
    ),
    "write-input-view": (lambda m, x: m.linear(x.view(-1, 3).add_(1)), "must not write into its input"),
    "write-view": (_writes_view, "must not have views that are used later, got in-place 'add_'"),
    "write-alias": (_writes_alias, "must not have views that are used later"),
    "out": (lambda m, x: torch.add(x, 1, out=m.linear(x)), "must not use out="),
    "plain-tensor-with-gradient": (lambda m, x: m.linear(x) + m.other.sum(), "got a Tensor in the attribute 'other'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("num_branches", [1, 2])
def test_fuse_refuses(name: str, num_branches: int) -> None:
    code, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        bsfast.fuse([
            Forward(code, history=[], other=torch.ones(3, requires_grad="gradient" in name))
            for _ in range(num_branches)
        ])


def test_fuse_refuses_unregistered_modules() -> None:
    hidden = nn.Linear(3, 3)
    for attribute in ([hidden], {"a": hidden}, partial(F.linear, weight=hidden.weight), lambda x: hidden(x)):
        with pytest.raises(ValueError, match=r"must be registered, got a .* in the attribute 'extra'"):
            fuse_code(lambda m, x: m.linear(x), extra=attribute)
    with pytest.raises(ValueError, match="must call registered modules only, got a Linear"):
        bsfast.fuse([_Global()])


GLOBAL = nn.Linear(3, 3)


class _Global(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return GLOBAL(x)


def _bound(m: Any, x: Tensor) -> Tensor:
    return m.inner(x)


def test_fuse_follows_bound_methods() -> None:
    branches = [Forward(_bound) for _ in range(2)]
    for branch in branches:
        branch.inner = branch.linear.forward
    x = torch.randn(4, 3)
    net = bsfast.fuse(branches)
    torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))
    with torch.no_grad():
        net.linear.weight.zero_()  # a copy: the branches do not see it, the network does
    assert net.branch_outputs(x).std(1).max() == 0


def test_fuse_refuses_forward_of_an_instance() -> None:
    branches = [nn.Sequential(nn.Linear(3, 3)) for _ in range(2)]
    for branch in branches:
        branch[0].forward = torch.tanh
    with pytest.raises(ValueError, match="must be a method of the class, got one set on the instance Linear '0'"):
        bsfast.fuse(branches)


@pytest.mark.parametrize(
    "difference", ["eps", "slope", "rate", "module", "shape", "dtype", "mode", "grad", "tie", "shared"]
)
def test_fuse_names_the_first_difference(difference: str) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(0.1), nn.BatchNorm1d(3), nn.Dropout(0.1), nn.Linear(3, 3))

    branches = [make() for _ in range(3)]
    odd = branches[2]
    change, message = {
        "eps": (
            lambda: setattr(odd[2], "eps", 1e-3),
            r"eps=1e-05 at '2' \(BatchNorm1d\) in branch 0 and 0.001 in branch 2",
        ),
        "slope": (
            lambda: setattr(odd[1], "negative_slope", 0.2),
            "'leaky_relu'.*negative_slope=0.1 in branch 0 and 0.2 in branch 2",
        ),
        "rate": (lambda: setattr(odd[3], "p", 0.2), "p=0.1 at '3'"),
        "module": (lambda: odd.__setitem__(1, nn.ReLU()), "LeakyReLU at '1' in branch 0 and ReLU in branch 2"),
        "shape": (
            lambda: odd.__setitem__(4, nn.Linear(3, 4)),
            r"'4.weight' must have one shape, got \(3, 3\).*\(4, 3\)",
        ),
        "dtype": (lambda: odd[4].double(), "'4.weight' must have one dtype, got torch.float32"),
        "mode": (lambda: odd[2].eval(), "same mode, got training=True at '2' in branch 0 and False in branch 2"),
        "grad": (lambda: odd[0].weight.requires_grad_(False), "'0.weight' must have one requires_grad, got True"),
        "tie": (
            lambda: setattr(odd[4], "weight", odd[0].weight),
            "tie the same.*'4.weight' tied to '4.weight' in branch 0",
        ),
        "shared": (lambda: setattr(odd[0], "bias", branches[1][0].bias), "'0.bias' shared by branches 1 and 2"),
    }[difference]
    change()
    with pytest.raises(ValueError, match=message):
        bsfast.fuse(branches)


def test_fuse_refuses_hooks_and_parametrizations() -> None:
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        branches = [nn.Sequential(nn.Linear(3, 3)) for _ in range(2)]
        getattr(branches[1][0], register)(lambda *_: None)
        with pytest.raises(ValueError, match=r"must have no hooks, got a .*hook on Linear '0' of branch 1"):
            bsfast.fuse(branches)
    branches = [torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)) for _ in range(2)]
    with pytest.raises(ValueError, match="must have no parametrizations"):
        bsfast.fuse(branches)


def test_fuse_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one module, got an empty list"):
        bsfast.fuse([])
    with pytest.raises(TypeError, match="got int at index 1"):
        bsfast.fuse([nn.Linear(1, 1), 3])
    with pytest.raises(TypeError, match="a list of modules or a callable, got one Sequential"):
        bsfast.fuse(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="positive int with a callable, got None"):
        bsfast.fuse(nn.ReLU)
    with pytest.raises(ValueError, match="left out with a list"):
        bsfast.fuse([nn.ReLU()], num_branches=2)
    with pytest.raises(ValueError, match="run one batch through it first"):
        bsfast.fuse([nn.LazyLinear(3)])
    with pytest.raises(ValueError, match="not be named like an attribute of Branched, got 'report'"):
        bsfast.fuse([nn.Sequential(OrderedDict(report=nn.ReLU()))])


def test_branched_refuses_wrong_inputs() -> None:
    net = bsfast.fuse([nn.Conv2d(3, 4, 3) for _ in range(2)])
    x = torch.randn(5, 3, 6, 6)
    with pytest.raises(ValueError, match=r"node '.*': conv2d: weight must have"):
        net(x[:, :2])
    with pytest.raises(ValueError, match=r"x must have H \+ 2 \* padding >= 3"):
        net(x[:, :, :2])
    with pytest.raises(TypeError, match="must have weight's dtype"):
        net(x.double())
    with pytest.raises(ValueError, match=r"conv2d: x must have shape \(N, C_in, H, W\)"):
        net(x.expand(2, *x.shape))  # forgot per_branch=True
    with pytest.raises(ValueError, match=r"must have shape \(M=2, N, ...\) with per_branch, got \(5, 3, 6, 6\)"):
        net(x, per_branch=True)
    with pytest.raises(TypeError, match="at most 1 inputs"):
        net(x, x)
    with pytest.raises(TypeError, match="must get the input 'input', got"):
        net()
    with pytest.raises(ValueError, match="one a positional input"):
        net(x, per_branch=[True, False])
