"""Errors that are not an operation's fault say what to do: tensors on two devices, and too little memory."""

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.nn import functional


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * self.scale * factor


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


HERE = str(torch.empty(0).device)


@pytest.mark.parametrize("training", [True, False])
def test_branched_on_another_device_than_its_input(training):
    net, x = bsfast.fuse(convolutional, num_branches=2).train(training), torch.randn(2, 3, 5, 5)
    own = rf"; the network is on {HERE} and what the node takes on meta: move all to one device by .to\(device\)$"
    other = rf"; the network is on meta and what the node takes on {HERE}: move all to one device by .to\(device\)$"
    for call in (net, net.branch_outputs, net.report):
        with pytest.raises(TypeError, match=r"^Branched: at node '\w+': .*" + own):
            call(x.to("meta"))
    net.to("meta")
    for call, settings in ((net, {}), (net, {"per_branch": True}), (net.branch_outputs, {})):
        inputs = torch.stack([x, x]) if settings else x
        with pytest.raises(TypeError, match=r"^Branched: at node '\w+': .*" + other):
            call(inputs, **settings)


def test_branched_on_two_devices():
    net = bsfast.fuse(convolutional, num_branches=2)
    net.get_submodule("1").to("meta")
    with pytest.raises(RuntimeError, match=rf"at node '_\d': .*; the network is on {HERE} and meta and what"):
        net(torch.randn(2, 3, 5, 5))


def test_branched_takes_numbers_from_the_cpu_and_advises_on_devices_only():
    net, x, number = bsfast.fuse(Scaled, num_branches=2), torch.randn(4, 3), torch.tensor(2.0, device="cpu")
    torch.testing.assert_close(net(x, number), 4 * x)
    with pytest.raises(RuntimeError, match=r"^Branched: at node 'mul': (?!.*device)"):
        net(torch.randn(4, 5), number)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.fixture
def net() -> bsfast.Branched:
    return bsfast.fuse(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), num_branches=2)


def test_branched_out_of_memory(net, monkeypatch):
    monkeypatch.setattr(functional, "conv2d", out_of_memory)
    said = (
        r"^Branched: at node '_0': CUDA out of memory. Tried to allocate 20.00 GiB; take fewer samples at once, fuse "
    )
    with pytest.raises(torch.OutOfMemoryError, match=said):
        net(torch.randn(2, 3, 5, 5))


def test_hessian_product_out_of_memory(net, monkeypatch):
    H = bsfast.hessian.HessianOperator(net, nn.MSELoss(), (torch.randn(4, 3, 5, 5), torch.randn(4, 4, 3, 3)))
    vector = torch.ones(H.shape[0])
    truth = H @ vector
    with monkeypatch.context() as patch:
        patch.setattr(functional, "conv2d", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match=r"(?s)Tried .*\nHessianOperator: a product must fit into mem"):
            _ = H @ vector
    torch.testing.assert_close(H @ vector, truth)
