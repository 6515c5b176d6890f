"""What a CUDA graph of a network refuses; without a GPU something stands in for the graph."""

import pytest
import torch
from torch import Tensor, nn

import bsfast
from tests.fuse.replay import ON_GPU, capture_by, make_branch


@pytest.fixture
def capture(monkeypatch):
    return capture_by(monkeypatch)


@pytest.fixture
def net() -> bsfast.Branched:
    return bsfast.fuse(make_branch, num_branches=3)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 6, 5)


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


class Assigning(nn.Module):
    """Runs as it is written, branch by branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.shape[0] > 1:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y - self.mean


@pytest.mark.filterwarnings("ignore:bsfast")
def test_cuda_graph_refuses_buffers_that_are_assigned(capture):
    net, x = bsfast.fuse(Assigning, num_branches=2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="buffers must be written in place, got another tensor as 'mean'"):
        capture(net, x)
    assert net.get_buffer("mean").eq(0).all()


def test_cuda_graph_refuses_late_hooks(net, x, capture):
    graph = capture(net, x)
    net.get_submodule("1").register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no module may have hooks, a replay calls none, got one on '1'"):
        graph(x)


@pytest.mark.skipif(ON_GPU, reason="a GPU fails in its own words")
def test_cuda_graph_says_why_a_capture_may_fail(net, x, capture, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(RuntimeError, match=r"must not wait for the GPU, as .item\(\) .* failed: CUDA error: operation"):
        capture(net, x)
