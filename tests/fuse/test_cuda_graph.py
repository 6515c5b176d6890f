"""A network as a CUDA graph equals the network; without a GPU something stands in for the graph, with fixed memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

import bsfast
from bsfast.fuse.cuda_graph import CudaGraph

ON_GPU = torch.empty(0).is_cuda
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32: the network and its graph may choose other algorithms


def replayed_without_a_gpu(function: Callable[..., Tensor], given: tuple[Tensor, ...], allow_unused_input: bool) -> Any:
    """Do as ``torch.cuda.make_graphed_callables``: warm-up, then fixed memory for inputs, results and gradients."""
    assert allow_unused_input
    assert not torch.is_autocast_enabled("cpu")
    assert not any(isinstance(tensor, nn.Parameter) for tensor in given)  # autograd would bind them to this stream
    leaves = [tensor for tensor in given if tensor.requires_grad]
    for _ in range(3):
        outputs = function(*given)
        if outputs.requires_grad:
            torch.autograd.grad(outputs, leaves, torch.empty_like(outputs), allow_unused=True)
    result = torch.empty_like(outputs, requires_grad=False)
    grads = [torch.empty_like(tensor, requires_grad=False) for tensor in given]
    recorded: list[Tensor] = []

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            for own, tensor in zip(given, tensors, strict=True):
                if own.data_ptr() != tensor.data_ptr():
                    own.copy_(tensor)
            unchecked = saved_tensors_hooks(lambda kept: kept, lambda kept: kept)  # a replay knows of no versions
            with torch.inference_mode(False), torch.enable_grad(), unchecked:
                recorded[:] = [function(*given)]
            return result.copy_(recorded[0].detach()).detach()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            with torch.enable_grad():
                found = iter(torch.autograd.grad(recorded[0], leaves, grad, allow_unused=True, retain_graph=True))
            values = [next(found) if tensor.requires_grad else None for tensor in given]
            return tuple(
                None if value is None else own.copy_(value).detach() for own, value in zip(grads, values, strict=True)
            )

    return Replay.apply


@pytest.fixture
def capture(monkeypatch):
    """Capture a network; where there is no GPU, past the check that there is one."""
    if ON_GPU:
        return lambda net, *inputs, **settings: net.cuda_graph(*inputs, **settings)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", replayed_without_a_gpu)
    return lambda net, *inputs, per_branch=False: CudaGraph(net, inputs, per_branch)


def make_branch() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))


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
    """Runs by vmap; torch keeps a list of its parameters beside them. One is tied, one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.first, self.second = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.rnn(x)[0])))


@pytest.mark.filterwarnings("ignore:bsfast")
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


def test_cuda_graph_refuses_other_inputs(net, x, capture):
    graph = capture(net, x)
    for other, got in (
        (x[:2], r"\(2, 3, 6, 5\) of torch.float32 on"),
        (x.double(), "torch.float64 on"),
        (x.to("meta"), "on meta"),
        (x.clone().requires_grad_(), ", requires_grad"),
        (1, "int"),
    ):
        with pytest.raises(ValueError, match=rf"^cuda_graph: input 0 must be as captured, \(4, 3, 6, 5\) of .*{got}"):
            graph(other)
    with pytest.raises(TypeError, match=r"as many inputs must come as captured, 1, got 2"):
        graph(x, x)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda net: net.eval(), r"'the network' must be in the mode .*, training=True, got False"),
        (lambda net: net.get_submodule("1").eval(), r"'1' must be in the mode"),
        (lambda net: net.double(), "another memory or requires_grad of '0.weight'"),
        (lambda net: setattr(net.get_submodule("6"), "bias", nn.Parameter(torch.zeros(3, 2))), "of '6.bias'"),
        (lambda net: setattr(net.get_submodule("1"), "running_var", torch.ones(3, 4)), "of '1.running_var'"),
        (lambda net: net.get_parameter("3.weight").requires_grad_(False), "of '3.weight'"),
    ],
)
def test_cuda_graph_refuses_a_changed_network(net, x, capture, change, got):
    graph = capture(net, x)
    graph(x)
    change(net)
    with pytest.raises(ValueError, match=f"^cuda_graph: .*{got}"):
        graph(x)


def test_cuda_graph_refuses_a_late_backward(net, x, capture):
    graph = capture(net, x)
    first, second = graph(x), graph(2 * x)
    with pytest.raises(RuntimeError, match=r"^cuda_graph: backward must be called once, before the next call, got"):
        first.sum().backward()
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^cuda_graph: backward must be called once"):
        second.sum().backward()
    third = graph(x)
    with torch.no_grad():
        net.get_parameter("0.weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        third.sum().backward()
    (grad,) = torch.autograd.grad(graph(x).square().sum(), net.get_parameter("0.weight"), create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        grad.sum().backward()


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_graph_needs_a_gpu(net, x):
    with pytest.raises(RuntimeError, match=r"^cuda_graph: a CUDA device must be there, got none .*; call the network"):
        net.cuda_graph(x)


def test_cuda_graph_needs_inputs_on_it(net, x, pretend):
    with pytest.raises(ValueError, match=r"on one CUDA device, got input 0 on cpu; move them by"):
        net.cuda_graph(x.cpu())
    for inputs, got in (((), r"\[\]"), ((x, 3), r"\['Tensor', 'int'\]")):
        with pytest.raises(TypeError, match=rf"^cuda_graph: inputs must be tensors, at least one, got {got}"):
            net.cuda_graph(*inputs)


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


def test_cuda_graph_refuses_hooks_and_other_devices(net, x, pretend):
    x = x if ON_GPU else x.as_subclass(OnGpu)
    with pytest.raises(ValueError, match=r"on one CUDA device, got 0.weight on cpu"):
        net.cpu().cuda_graph(x)
    for module in net.modules():
        for home in (module._parameters, module._buffers):
            home.update(dict.fromkeys(home, x))
    net.get_submodule("3").register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"no module may have hooks, a replay calls none, got one on '3'"):
        net.cuda_graph(x)
