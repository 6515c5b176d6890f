"""Convolutions that are computed together with pooling or upsampling: same values and derivatives, or not at all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bsfast
from bsfast.fuse.rewrites import pooled_weight
from bsfast.reference import ReferenceBranched

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


class Net(nn.Module):
    """A convolution with a line around it."""

    def __init__(self, line, *settings):
        super().__init__()
        self.conv = nn.Conv2d(*settings)
        self.line = line

    def forward(self, x):
        return self.line(self.conv, x)


def avg_pool(*settings, **named):
    return lambda conv, x: F.avg_pool2d(conv(x), *settings, **named)


def enlarge(factor=2, mode="nearest"):
    return lambda conv, x: conv(F.interpolate(x, scale_factor=factor, mode=mode))


def twice(conv, x):
    y = conv(x)
    return F.avg_pool2d(y, 2) + y.mean()


def enlarged_twice(conv, x):
    y = F.interpolate(x, scale_factor=2)
    return conv(y) + y.mean()


REWRITTEN = {
    "3x3, pool 2": (avg_pool(2), 2, 3, 3, 1, 1),
    "3x3 without padding, pool 2": (avg_pool(2, 2), 2, 3, 3),
    "3x3, pool 3x2": (avg_pool((3, 2)), 2, 3, 3, 1, 2),
    "5x2 with groups, pool 2": (avg_pool(kernel_size=2), 4, 2, (5, 2), 1, (1, 0), 1, 2),
    "3x3 without bias, pool 2": (avg_pool(2), 2, 3, 3, 1, 1, 1, 1, False),
    "1x1, pool 2": (avg_pool(2), 2, 3, 1),
    "1x1, overlapping pool": (avg_pool(3, 2), 2, 3, 1),
    "1x1, adaptive pool": (lambda conv, x: F.adaptive_avg_pool2d(conv(x), (1, 3)), 2, 3, 1),
    "upsample, 3x3": (enlarge(), 2, 3, 3, 1, 1),
    "upsample, 3x3 with groups": (enlarge((2, 2), "nearest-exact"), 4, 6, 3, 1, 1, 1, 2),
    "upsample, 3x3 without bias": (enlarge(), 2, 3, 3, 1, 1, 1, 1, False),
    "upsample, 1x1": (enlarge(), 2, 3, 1),
    "upsample 3x1, 1x1": (enlarge((3.0, 1.0)), 4, 2, 1, 1, 0, 1, 2),
}
APART = {
    "used twice": (twice, 2, 3, 3, 1, 1),
    "stride": (avg_pool(2), 2, 3, 3, 2),
    "dilation": (avg_pool(2), 2, 3, 3, 1, 1, 2),
    "padding by name": (avg_pool(2), 2, 3, 3, 1, "same"),
    "overlapping pool": (avg_pool(2, 1), 2, 3, 3),
    "padded pool": (avg_pool(2, padding=1), 2, 3, 3),
    "padded pool of 1x1": (avg_pool(2, padding=1), 2, 3, 1),
    "ceil mode": (avg_pool(2, ceil_mode=True), 2, 3, 3),
    "divisor": (avg_pool(2, divisor_override=3), 2, 3, 3),
    "max pool": (lambda conv, x: F.max_pool2d(conv(x), 2), 2, 3, 3),
    "adaptive pool of 3x3": (lambda conv, x: F.adaptive_avg_pool2d(conv(x), 2), 2, 3, 3),
    "padded 1x1 before a pool of 1": (avg_pool(1), 2, 3, 1, 1, 1),
    "bilinear": (lambda conv, x: conv(F.interpolate(x, scale_factor=2, mode="bilinear")), 2, 3, 3, 1, 1),
    "upsample to a size": (lambda conv, x: conv(F.interpolate(x, size=(12, 10))), 2, 3, 1),
    "upsample 3, 3x3": (enlarge(3), 2, 3, 3, 1, 1),
    "upsample 1.5, 1x1": (enlarge(1.5), 2, 3, 1),
    "upsample, 3x3 without padding": (enlarge(), 2, 3, 3),
    "enlarged value used twice": (enlarged_twice, 2, 3, 1),
}


def fused_and_truth(settings, branches=3):
    torch.manual_seed(0)
    modules = [Net(*settings).double() for _ in range(branches)]
    return bsfast.fuse(copy.deepcopy(modules)), ReferenceBranched(modules)


def rewrites(net):
    return {
        step.target.kind for program in net._programs.values() for step in program.schedule(net) if step.op == "rewrite"
    }


def ran(net, *inputs, **named):
    """Whether the rewrite ran on these inputs, as the report has it."""
    return any(" + " in row.node for row in net.report(*inputs, **named).rows)


def derivatives(module, x, per_branch):
    """Value, gradients and second derivatives, of the input and of the parameters."""
    x = x.clone().requires_grad_()
    leaves = [x, *module.parameters()]
    y = module(x, per_branch=True) if per_branch else module(x)
    first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
    return y, first, second


def by_branch(module, tensors, branches):
    """Gradients of the input, then of every parameter stacked over branches."""
    x, *rest = tensors
    if isinstance(module, bsfast.Branched):
        return [x, *rest]
    size = len(rest) // branches
    return [x, *(torch.stack([rest[k * size + i] for k in range(branches)]) for i in range(size))]


@pytest.mark.parametrize("per_branch", [False, True], ids=["shared", "per branch"])
@pytest.mark.parametrize("samples", [17, 3])
@pytest.mark.parametrize("name", [*REWRITTEN, *APART])
def test_rewrites_compute_what_their_steps_do(name, samples, per_branch):
    net, truth = fused_and_truth((REWRITTEN | APART)[name])
    assert bool(rewrites(net)) == (name in REWRITTEN)
    shape = (samples, net.get_submodule("conv").settings.in_channels, 7, 6)
    x = torch.randn(3, *shape, dtype=torch.float64) if per_branch else torch.randn(shape, dtype=torch.float64)
    value, *own = derivatives(net, x, per_branch)
    expected, *wanted = derivatives(truth, x, per_branch)
    torch.testing.assert_close(value, expected, **DOUBLE)
    assert ran(net, x, per_branch=per_branch) == (name in REWRITTEN)
    for got, want in zip(own, wanted, strict=True):
        for one, other in zip(by_branch(net, got, 3), by_branch(truth, want, 3), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewrites_change_no_state(name):
    net, truth = fused_and_truth(REWRITTEN[name])
    assert {key: tensor.shape[1:] for key, tensor in net.state_dict().items()} == {
        key: tensor.shape for key, tensor in truth.branches[0].state_dict().items()
    }
    for branch, back in zip(truth.branches, bsfast.unfuse(net), strict=True):
        for key, tensor in branch.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[key])


def test_rewrites_follow_from_those_of_weights():
    weight = torch.randn(2, 3, 3, dtype=torch.float64)
    four = pooled_weight(weight, (2, 2))
    for s in range(4):
        for t in range(4):
            inside = [weight[:, s - a, t - b] for a in (0, 1) for b in (0, 1) if 0 <= s - a < 3 and 0 <= t - b < 3]
            torch.testing.assert_close(four[:, s, t], torch.stack(inside).sum(0) / 4)


@pytest.mark.parametrize(("name", "size"), [("upsample, 3x3", (1, 1)), ("1x1, adaptive pool", (1, 3))])
def test_rewrites_only_where_they_save(name, size):
    net, truth = fused_and_truth(REWRITTEN[name])
    x = torch.randn(5, 2, *size, dtype=torch.float64)
    assert not ran(net, x)
    torch.testing.assert_close(net(x), truth(x), **DOUBLE)


def test_rewrites_take_one_image():
    net, truth = fused_and_truth(REWRITTEN["3x3, pool 2"])
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    assert not ran(net, x)
    torch.testing.assert_close(net(x), truth(x), **DOUBLE)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 3, 6, 6), None), ((5, 2, 2, 2), None), ((5, 2, 6, 6), torch.float32)]
)
def test_rewrites_leave_errors_to_their_steps(shape, dtype):
    net, _ = fused_and_truth(REWRITTEN["3x3 without padding, pool 2"])
    x = torch.randn(shape, dtype=dtype or torch.float64)
    with pytest.raises((ValueError, TypeError), match="at node 'conv': conv2d: "):
        net(x)


@pytest.mark.parametrize("name", ["3x3, pool 2", "1x1, pool 2", "upsample, 3x3", "upsample, 1x1"])
def test_rewrites_stop_where_a_hook_watches(name):
    net, truth = fused_and_truth(REWRITTEN[name])
    x, seen = torch.randn(17, 2, 6, 6, dtype=torch.float64), []
    handle = net.get_submodule("conv").register_forward_hook(lambda _m, _args, y: seen.append(y.shape[-1]))
    torch.testing.assert_close(net(x), truth(x), **DOUBLE)
    assert seen == [12 if "upsample" in name else 6]
    handle.remove()
    net(x)
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no rule for nearest-exact
@pytest.mark.parametrize("name", REWRITTEN)
def test_rewrites_go_through_function_transforms(name):
    net, truth = fused_and_truth(REWRITTEN[name], branches=2)
    x = torch.randn(1, net.get_submodule("conv").settings.in_channels, 6, 4, dtype=torch.float64)

    def of(module: nn.Module) -> Tensor:
        return torch.func.hessian(lambda t: module(t).pow(3).sum())(x)

    torch.testing.assert_close(of(net), of(truth), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["3x3, pool 2", "1x1, pool 2", "upsample, 3x3", "upsample, 1x1"])
def test_rewrites_compile(name):
    torch._dynamo.reset()
    net, truth = fused_and_truth(REWRITTEN[name])
    x = torch.randn(17, 2, 6, 6, dtype=torch.float64)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), truth(x), **DOUBLE)


def test_rewrites_are_named_in_reports():
    net, _ = fused_and_truth(REWRITTEN["3x3, pool 2"])
    assert ("conv + avg_pool2d", "?") in [(row.node, row.kernel) for row in net.report().rows]
    rows = net.report(torch.randn(17, 2, 6, 6, dtype=torch.float64)).rows
    (row,) = [row for row in rows if row.node == "conv + avg_pool2d"]
    assert row.operation == "Conv2d + avg_pool2d"
    assert row.reason.startswith("with the pooling one 4x4 convolution of stride 2x2; ")
    small = net.report(torch.randn(2, 6, 6, dtype=torch.float64)).rows
    assert [row.node for row in small] == ["x", "conv", "avg_pool2d"]


def test_rewrites_join_chains_of_normalisation():
    class Block(nn.Sequential):
        def __init__(self):
            up = nn.UpsamplingNearest2d(scale_factor=2)
            layers = nn.Conv2d(2, 3, 3, 1, 1), nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.ReLU()
            super().__init__(*layers, up, nn.Conv2d(3, 2, 3, 1, 1), nn.AdaptiveAvgPool2d(1))

    torch.manual_seed(0)
    modules = [Block().double() for _ in range(3)]
    net, truth = bsfast.fuse(copy.deepcopy(modules)), ReferenceBranched(modules)
    assert rewrites(net) == {"pooled", "enlarged"}
    assert "chain" in {step.op for program in net._programs.values() for step in program.schedule(net)}
    x = torch.randn(17, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), truth(x), rtol=1e-11, atol=1e-11)
