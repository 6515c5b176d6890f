"""A network as a CUDA graph equals the network; without a GPU something stands in for the graph."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bsfast
from tests.fuse.replay import capture_by, make_branch

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32: the network and its graph may choose other algorithms


@pytest.fixture
def capture(monkeypatch):
    return capture_by(monkeypatch)


@pytest.fixture
def net() -> bsfast.Branched:
    return bsfast.fuse(make_branch, num_branches=3)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 6, 5)


def grads_of(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per_branch", [True, False])
def test_cuda_graph_trains_as_the_network(net, x, capture, training, per_branch):
    x = torch.randn(3, *x.shape) if per_branch else x
    net.train(training)
    eager = copy.deepcopy(net)
    graph = capture(net, x, per_branch=per_branch)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (net, eager)]
    for _ in range(3):
        batch = torch.randn_like(x)
        outputs = [graph(batch), eager(batch, per_branch=per_branch)]
        torch.testing.assert_close(*outputs, **CLOSE)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
        torch.testing.assert_close(grads_of(net), grads_of(eager), **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(net.state_dict(), eager.state_dict(), **CLOSE)


def test_cuda_graph_capture_changes_nothing(x, capture):
    net = bsfast.fuse(lambda: nn.Sequential(make_branch(), nn.Dropout(0.5)), num_branches=2)
    state, given = copy.deepcopy(net.state_dict()), x.clone()
    torch.manual_seed(1)
    truth = torch.rand(5)
    torch.manual_seed(1)
    graph = capture(net, x)
    assert torch.equal(torch.rand(5), truth)
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in net.parameters())
    draws = [graph(x) for _ in range(2)]
    assert not torch.equal(*draws)  # so many elements are dropped alike once in 10^4 runs
    assert torch.equal(x, given)
    assert net.get_submodule("0.1").num_batches_tracked.tolist() == [2, 2]


def test_cuda_graph_adds_up_gradients_and_keeps_results(net, x, capture):
    batches = [torch.randn_like(x) for _ in range(2)]
    eager = copy.deepcopy(net)
    graph = capture(net, x)
    first, *_ = kept = [graph(batch) for batch in batches]
    assert not torch.equal(*kept)
    torch.testing.assert_close(first, eager(batches[0]), **CLOSE)
    net.zero_grad()
    eager.zero_grad()
    for batch in batches:
        for function in (graph, eager):
            function(batch).square().sum().backward()
    torch.testing.assert_close(grads_of(net), grads_of(eager), **CLOSE)
    for module in (net, eager):
        module.zero_grad(set_to_none=False)
    for function in (graph, eager):
        function(x).square().sum().backward()
    torch.testing.assert_close(grads_of(net), grads_of(eager), **CLOSE)


class Recurrent(nn.Module):
    """Runs branch by branch; torch keeps a list of its parameters beside them. One is tied, one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.first, self.second = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.rnn(x)[0])))


@pytest.mark.filterwarnings("ignore:bsfast", "ignore:RNN module weights")  # the latter of cuDNN, which copies them
def test_cuda_graph_of_tied_and_unused_parameters(capture):
    net, x = bsfast.fuse(Recurrent, num_branches=2), torch.randn(3, 5, 3)
    eager = copy.deepcopy(net)
    graph = capture(net, x)
    for function in (graph, eager):
        function(x).square().sum().backward()
    torch.testing.assert_close(grads_of(net), grads_of(eager), **CLOSE)
    assert net.get_parameter("unused").grad is None
    assert net.get_parameter("rnn.weight_ih_l0").grad.abs().sum() > 0


def test_cuda_graph_gradient_of_the_input(net, x, capture):
    x.requires_grad_()
    graph, eager = capture(net, x), copy.deepcopy(net)
    (grad,) = torch.autograd.grad(graph(x).square().sum(), x)
    (truth,) = torch.autograd.grad(eager(x).square().sum(), x)
    torch.testing.assert_close(grad, truth, **CLOSE)


def test_cuda_graph_under_no_grad(net, x, capture):
    net.eval()
    graph = capture(net, x)
    with torch.no_grad():
        forward = capture(net, x)
        assert not graph(x).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(graph(x), net(x), **CLOSE)
        again = capture(net, x)
    for without in (forward, again):
        y = without(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, net(x), **CLOSE)


def test_cuda_graph_under_autocast(net, x, capture):
    device = x.device.type
    with torch.autocast(device, torch.bfloat16):
        graph = capture(net, x)
        assert graph(x).dtype == torch.bfloat16
        with (
            torch.autocast(device, torch.float16),
            pytest.raises(ValueError, match=r"bfloat16, got torch.float16; cap"),
        ):
            graph(x)
    with pytest.raises(ValueError, match=r"autocast must be as captured, torch.bfloat16, got off"):
        graph(x)
    plain = capture(net, x)
    with torch.autocast(device), pytest.raises(ValueError, match=r"autocast must be as captured, off, got torch."):
        plain(x)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_cuda_graph_results_without_gradients(capture):
    net, x = bsfast.fuse(lambda: Detached(3, 2), num_branches=2), torch.randn(4, 3)
    y = capture(net, x)(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, net(x), **CLOSE)
