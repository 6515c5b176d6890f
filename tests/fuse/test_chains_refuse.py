"""Where chains must run step by step, or take a gradient of another kind, and still be right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bsfast
from bsfast.reference import ReferenceBranched
from tests.fuse.test_chains import chains


def pair(make, branches=2):
    """A fused network and the loop over the same branches."""
    torch.manual_seed(0)
    modules = [make() for _ in range(branches)]
    return bsfast.fuse(copy.deepcopy(modules)), ReferenceBranched(modules)


class Behind(nn.Module):
    """A block that normalises what was computed from its residual."""

    def __init__(self, first):
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first = first
        self.double()

    def forward(self, x):
        h = self.stem(x)
        return F.relu(self.bn(self.conv(self.first(h))) + h)


DEPENDENT = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "reflected": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1],
    "itself": lambda h: h,
}


@pytest.mark.parametrize("first", DEPENDENT)
def test_differentiable_gradients_of_operands_that_depend_on_each_other(first):
    net, truth = pair(lambda: Behind(DEPENDENT[first]))
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    names = [name for name, _ in net.named_parameters()]
    wanted = [[dict(branch.named_parameters())[name] for branch in truth.branches] for name in names]
    flat = [parameter for of_name in wanted for parameter in of_name]
    found = torch.autograd.grad(net(x).square().sum(), list(net.parameters()), create_graph=True)
    expected = torch.autograd.grad(truth(x).square().sum(), flat, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in found), list(net.parameters()))
    expected_again = torch.autograd.grad(sum(g.square().sum() for g in expected), flat)
    for own, stock in ((found, expected), (again, expected_again)):
        for i, gradient in enumerate(own):
            torch.testing.assert_close(
                gradient, torch.stack(stock[2 * i : 2 * i + 2]), rtol=1e-8, atol=1e-6
            )  # of a bias before a normalisation it is 0


MANY = {
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
    "instance norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU()),
    "block": lambda: Behind(F.relu),
}


@pytest.mark.parametrize("name", MANY)
def test_several_gradients_at_once(name):
    net, truth = pair(lambda: MANY[name]().double())
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    pick = lambda f: lambda x: f(x).flatten()[::29]  # noqa: E731
    own = torch.autograd.functional.jacobian(pick(net), x, vectorize=True)
    torch.testing.assert_close(own, torch.autograd.functional.jacobian(pick(truth), x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("samples", [1, 2, 5, 17])
def test_one_channel_of_one_pixel(samples):
    net, truth = pair(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 4)).double()
    )
    x = torch.randn(samples, 3, 4, 4, dtype=torch.float64)
    grads = []
    for module in (net, truth):
        own = x.clone().requires_grad_()
        module(own).square().sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", [True, False])
def test_a_kernel_larger_than_its_input_is_refused(train):
    net = bsfast.fuse([nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 4)) for _ in range(2)])
    net.train(train)
    for size in (3, 2):
        for context in (torch.enable_grad(), torch.no_grad()):
            with context, pytest.raises(ValueError, match=r"at node '_2': conv2d: .*kernel"):
                net.branch_outputs(torch.randn(5, 3, size, size))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("channels", [1, 8])
def test_a_normalisation_of_other_channels_is_refused(train, channels):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.next = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.next(self.bn(self.conv(x)))

    net = bsfast.fuse([Wrong() for _ in range(2)]).train(train)
    net(torch.randn(5, 3, 4, 4))
    net.bn = bsfast.fuse([nn.BatchNorm2d(channels) for _ in range(2)]).train(train)._layers[0]
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(ValueError, match=rf"at node 'bn': batch_norm: x must have C={channels} channels"):
            net(torch.randn(5, 3, 4, 4))


@pytest.mark.parametrize("train", [True, False])
def test_a_module_that_takes_the_place_of_a_part_runs(train):
    class Twice(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return 2 * self.conv(x)

    net = bsfast.fuse([nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)]).train(train)
    x = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        net(x)
        before = net.branch_outputs(x)
        setattr(net, "0", Twice(net.get_submodule("0")))
        after = net.branch_outputs(x)
    if train:  # what is normalised may have any scale
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    else:
        assert not torch.equal(after, before)


def test_hooks_of_all_modules_fire_inside_chains():
    net, _ = pair(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    net(torch.randn(5, 3, 4, 4))
    assert chains(net)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        net(torch.randn(5, 3, 4, 4))
    finally:
        handle.remove()
    assert {bsfast.nn.Conv2d, bsfast.nn.BatchNorm} <= set(seen)


def test_a_value_without_a_gradient_stays_so():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.na, self.b, self.nb = (
                nn.Conv2d(3, 2, 1),
                nn.BatchNorm2d(2),
                nn.Conv2d(3, 2, 1),
                nn.BatchNorm2d(2),
            )

        def forward(self, x):
            y = x.abs()
            return self.na(self.a(y)) + self.nb(self.b(y)), y

    net = bsfast.fuse([Two() for _ in range(2)])
    y, given = net.branch_outputs(torch.randn(2, 5, 3, 4, 4), per_branch=True)
    assert y.requires_grad
    assert not given.requires_grad
