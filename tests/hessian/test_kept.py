"""What Hessian products keep is forgotten when anything it came from changes: against fresh operators."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bsfast.hessian import ClampedCrossEntropy, HessianOperator
from bsfast.ops.backend import native_why_not
from tests.hessian import truth
from tests.hessian.test_sweeps import resnet
from tests.hessian.truth import error

pytestmark = pytest.mark.skipif(native_why_not("cpu") is not None, reason=f"no own kernels: {native_why_not('cpu')}")
EXACT = 1e-12


def operator(loss=F.cross_entropy):
    net, branches = truth.make(resnet, 2)
    x, y = truth.batch()
    H = HessianOperator(net, loss, (x, y))
    u = torch.randn(H.shape[0], dtype=torch.float64)
    H @ u
    return net, branches, x, y, H, u


def check(H, net, loss, data, u):
    assert error(H @ u, HessianOperator(net, loss, data) @ u) < EXACT


def test_kept_losses_are_evaluated_anew():
    temperature = [1.0]

    def scaled(f, y):
        return F.cross_entropy(f / temperature[0], y)

    net, _, x, y, H, u = operator(scaled)
    temperature[0] = 2.0
    check(H, net, scaled, (x, y), u)
    clamped = ClampedCrossEntropy()
    net, _, x, y, H, u = operator(clamped)
    clamped.bound /= 3
    check(H, net, clamped, (x, y), u)


def test_kept_values_are_copies():
    net, _, x, y, H, u = operator()
    before = H @ u
    for own in net.parameters():  # the same values at another place, the old one taken for another use
        old = own.data
        own.data = old.clone()
        old.zero_()
    assert torch.equal(H @ u, before)
    given = x.movedim(0, -1).contiguous().movedim(-1, 0)  # in the memory order of the kernels
    batches = [(given, y)]
    H = HessianOperator(net, F.cross_entropy, batches)
    before = H @ u
    batches[0] = (given.clone(), y)
    given.zero_()
    assert error(H @ u, before) < EXACT


def test_kept_values_depend_on_hooks_and_settings():
    net, _, x, y, H, u = operator()
    net.get_submodule("1").settings.eps = 0.5
    check(H, net, F.cross_entropy, (x, y), u)
    handle = net.get_submodule("0").register_forward_hook(lambda module, args, output: 2 * output)
    check(H, net, F.cross_entropy, (x, y), u)
    handle.remove()
    check(H, net, F.cross_entropy, (x, y), u)


def test_other_parameters_are_refused():
    net, _, _, _, H, u = operator()
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="must keep the parameters that were chosen"):
        H @ u
    net, _, _, _, H, u = operator()
    net.float()
    with pytest.raises(ValueError, match=r"must stay in torch\.float64 on cpu, got .*float32"):
        H @ u


@pytest.mark.parametrize("limit", [-1, None, "2 GiB"])
def test_kept_bytes_are_checked(limit):
    net, _ = truth.make(resnet, 2)
    with pytest.raises(ValueError, match=f"max_kept_bytes must be an int of at least 0, got {limit!r}"):
        HessianOperator(net, F.cross_entropy, truth.batch(), max_kept_bytes=limit)


class Frequencies(nn.Module):
    """Complex numbers between parameters and result."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.bn = truth.BatchNorm(3)
        self.linear = nn.Linear(48, truth.CLASSES)

    def forward(self, x):
        return self.linear(torch.fft.fft2(F.relu(self.bn(self.conv(x)))).abs().flatten(1))


def test_derivatives_pass_through_complex_numbers():
    net, branches = truth.make(lambda: Frequencies().eval(), 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data)
    u = torch.randn(H.shape[0], dtype=torch.float64)
    assert error(H @ u, truth.hessian(branches, F.cross_entropy, data) @ u) < 1e-9
