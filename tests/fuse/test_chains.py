"""Convolution, normalisation, sum and ReLU that run as one: where they are joined, and that nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bsfast
from bsfast.fuse.function_rules import as_written
from bsfast.reference import ReferenceBranched
from tests.cases import in_order


class Block(nn.Module):
    """A residual block whose last lines are given."""

    def __init__(self, end):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.next = nn.Conv2d(3, 2, (3, 2), stride=(1, 2), padding=1)
        self.end = end

    def forward(self, x):
        return self.end(self, x, self.conv(x))


def twice(_m, value):
    return value * torch.relu(value)


# The end of a block, and the steps that are joined in training and in evaluation without gradients.
ENDS = {
    "relu module": (lambda m, _x, y: m.relu(m.bn(y)), ["conv", "bn relu"], ["conv bn relu"]),
    "F.relu": (lambda m, _x, y: F.relu(m.bn(y), inplace=True), ["conv", "bn relu"], ["conv bn relu"]),
    "method": (lambda m, _x, y: m.bn(y).relu(), ["conv", "bn relu"], ["conv bn relu"]),
    "sum": (lambda m, x, y: m.bn(y) + x, ["conv", "bn add"], ["conv bn add"]),
    "sum and relu": (lambda m, x, y: torch.relu(x + m.bn(y)), ["conv", "bn add relu"], ["conv bn add relu"]),
    "in place": (
        lambda m, x, y: F.relu_(m.bn(y).add_(x)),
        ["conv", "bn add relu"],
        ["conv bn add relu"],
    ),
    "sum used twice": (lambda m, x, y: twice(m, m.bn(y) + x), ["conv", "bn add"], ["conv bn add"]),
    "two of them": (lambda m, x, y: m.relu(m.bn(y) + m.other(x)), ["conv", "bn add relu"], ["conv bn add relu"]),
    "one after the other": (
        lambda m, _x, y: m.relu(m.other(m.relu(m.bn(y)))),
        ["conv", "bn relu", "other relu"],
        ["conv bn relu"],
    ),
    "convolved": (lambda m, _x, y: m.next(m.relu(m.bn(y))), ["conv", "bn relu next"], ["conv bn relu"]),
    "convolved without relu": (lambda m, _x, y: m.next(m.bn(y)), ["conv", "bn next"], ["conv bn"]),
    "sum, then convolved": (lambda m, x, y: m.next(F.relu(m.bn(y) + x)), ["conv", "bn add relu"], ["conv bn add relu"]),
    "two in a row": (
        lambda m, _x, y: m.relu(m.other(m.conv(m.relu(m.bn(y))))),
        ["bn relu conv", "conv", "other relu"],
        ["conv bn relu", "conv other relu"],
    ),
    "no normalisation": (lambda m, x, y: m.relu(y + x), ["conv add relu"], ["conv add relu"]),
    "used twice": (lambda m, _x, y: twice(m, m.bn(y)), ["conv"], ["conv bn"]),
    "with itself": (lambda m, _x, y: torch.add(*[m.bn(y)] * 2), ["conv"], ["conv bn"]),
    "scaled sum": (lambda m, x, y: torch.add(m.bn(y), x, alpha=2), ["conv"], ["conv bn"]),
    "constant": (lambda m, _x, y: m.bn(y) + 1.0, ["conv"], ["conv bn"]),
    "another activation": (lambda m, _x, y: torch.tanh(m.bn(y)), ["conv"], ["conv bn"]),
}


def fused_and_truth(end, branches=3):
    torch.manual_seed(0)
    modules = [Block(end).double() for _ in range(branches)]
    return bsfast.fuse(copy.deepcopy(modules)), ReferenceBranched(modules)


def chains(net):
    """The chains of the program that ran last, each as the names of its steps."""
    *_, program = net._programs.values()
    joined = [step.target for step in program.schedule(net) if step.op == "chain"]
    return sorted(
        " ".join(part.name.removesuffix("_1").rstrip("_") for part in chain.parts if part.target is not as_written)
        for chain in joined
    )


def check(net, truth, x):
    for training in (True, False):
        net.train(training)
        truth.train(training)
        own, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = net(own), truth(wanted)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(net(x), truth(x), rtol=1e-10, atol=1e-10)
    plain = bsfast.unfuse(net)
    for got, branch in zip(plain, truth.branches, strict=True):
        for name, tensor in branch.state_dict().items():
            torch.testing.assert_close(got.state_dict()[name], tensor, rtol=1e-10, atol=1e-10)
    for name, parameter in net.named_parameters():
        for k, branch in enumerate(truth.branches):
            expected = dict(branch.named_parameters())[name].grad
            if expected is not None:
                torch.testing.assert_close(parameter.grad[k], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("samples", [17, 4])
@pytest.mark.parametrize("name", ENDS)
def test_chains_compute_what_their_steps_do(name, samples):
    end, in_training, in_evaluation = ENDS[name]
    net, truth = fused_and_truth(end)
    check(net, truth, torch.randn(samples, 3, 6, 5, dtype=torch.float64))
    assert chains(net) == sorted(in_evaluation)
    net.train()
    net(torch.randn(samples, 3, 6, 5, dtype=torch.float64))
    assert chains(net) == sorted(in_training)


def test_a_normalisation_that_changes_its_mode_changes_the_chains():
    net, truth = fused_and_truth(ENDS["two in a row"][0])
    for module in (net, truth):
        [part.eval() for name, part in module.named_modules() if name.endswith("bn")]
    x = torch.randn(17, 3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), truth(x))
    assert chains(net) == ["conv", "conv bn relu", "other relu"]


def test_normalised_activations_are_not_kept():
    net, _ = fused_and_truth(ENDS["convolved"][0])
    kept = set()
    pack = lambda t: (kept.add((t.data_ptr(), t.shape)), t)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(torch.randn(64, 3, 6, 5, dtype=torch.float64))
    assert sum(shape[-4:] == (64, 3, 6, 5) for _, shape in kept) == 2  # the input, and what is normalised


@pytest.mark.parametrize("shape", [(1, 3, 6, 5), (17, 3, 1, 1)])
def test_a_residual_that_is_broadcast_runs_step_by_step(shape):
    net, truth = fused_and_truth(lambda m, x, y: F.relu(m.bn(y) + x[: shape[0], :, : shape[2], : shape[3]]))
    check(net, truth, torch.randn(17, 3, 6, 5, dtype=torch.float64))
    assert chains(net)


def test_a_hook_inside_a_chain_fires():
    net, _ = fused_and_truth(ENDS["relu module"][0])
    seen = []
    net.get_submodule("bn").register_forward_hook(lambda _m, _args, y: seen.append(y.detach().min().item()))
    net(torch.randn(17, 3, 6, 5, dtype=torch.float64))
    assert len(seen) == 1
    assert seen[0] < 0


def test_a_backward_hook_inside_a_chain_sees_the_gradient_of_its_own_module():
    net, truth = fused_and_truth(ENDS["relu module"][0])
    seen = []
    net.get_submodule("bn").register_full_backward_hook(lambda _m, _in, out: seen.append(out[0]))
    for k, branch in enumerate(truth.branches):
        branch.bn.register_full_backward_hook(lambda _m, _in, out, k=k: seen.append((k, out[0])))
        branch.relu = nn.ReLU()
    x = torch.randn(17, 3, 6, 5, dtype=torch.float64)
    net(x).square().sum().backward()
    truth(x).square().sum().backward()
    fused = seen.pop(0)
    for k, expected in seen:
        torch.testing.assert_close(fused[k], expected)


def test_chains_go_through_function_transforms():
    net, truth = fused_and_truth(ENDS["sum and relu"][0])
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    net.eval()
    truth.eval()
    got = torch.func.hessian(lambda t: net(t).square().sum())(x[:1])
    expected = torch.func.hessian(lambda t: truth(t).square().sum())(x[:1])
    torch.testing.assert_close(got, expected)


def test_double_backward_through_a_chain_in_train_mode_updates_statistics_once():
    net, truth = fused_and_truth(ENDS["sum and relu"][0])
    x = in_order(torch.randn(17, 3, 4, 4, dtype=torch.float64), "contiguous")
    results = []
    for module in (net, truth):
        own = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(own).square().sum(), own, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), own)
        results.append((grad, second))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)
    assert net.get_submodule("bn").num_batches_tracked.tolist() == [1, 1, 1]


class Skips(nn.Module):
    """Values that a convolution takes, and others after it or before it."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(6)])

    def forward(self, x):
        z = self.norms[0](self.convs[0](x)).relu()
        y = self.norms[1](self.convs[1](z)).relu()
        z = (self.norms[2](self.convs[2](y)) + z).relu()
        left, right = self.norms[3](self.convs[3](z)), self.norms[4](self.convs[4](z))
        z = (left + right).relu()
        before = z.sum(1, keepdim=True)
        unused = self.norms[5](self.convs[5](z))
        return before, z * 2, unused.detach()


def test_gradients_of_a_skip_are_added_in_the_convolution():
    torch.manual_seed(0)
    modules = [Skips().double() for _ in range(3)]
    net, truth = bsfast.fuse(copy.deepcopy(modules)), ReferenceBranched(modules)
    x = torch.randn(17, 3, 6, 5, dtype=torch.float64)
    added = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor} and args[0].dim() == 5:
                added.append(args[0].shape)
            return function(*args, **kwargs or {})

    grads = []
    for module in (net, truth):
        own = x.clone().requires_grad_()
        before, z, _ = module.branch_outputs(own)
        loss = before.square().sum() + z.square().sum()
        (first,) = torch.autograd.grad(loss, own, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), own, retain_graph=True)
        with Watch():
            loss.backward()
        grads.append((own.grad, first, second))
        if module is net:
            assert len(added) == 1  # of the value that was used before a convolution took it
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)


def test_errors_in_a_chain_name_the_normalisation():
    net, _ = fused_and_truth(ENDS["relu module"][0])
    net.get_submodule("bn").weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"at node 'bn': batch_norm: x must have C=4 channels, got \(3, 17, 3, 6, 5\)"):
        net(torch.randn(17, 3, 6, 5, dtype=torch.float64))
