"""What cannot be traced runs by vmap, says so, and computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched
from tests.fuse.forward_code import Forward


def _if_shape(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) if x.shape[0] > 2 else m.linear(x).tanh()


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.linear(x).abs().mean()
    return m.linear(x) / scale


def _asks_type(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) if isinstance(x, Tensor) else x


def _looks_up(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) * {2: 3.0, 5: 7.0}.get(x.size(0), 1.0)


def _assigns_buffer(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    m.state = 0.9 * m.state + 0.1 * y.detach().mean(0)
    return y - m.state


def _writes_buffer(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    m.state.add_(y.detach().mean(0))
    return y - m.state


def _iterates(m: Any, x: Tensor) -> Tensor:
    return sum(m.linear(row) for row in x.unbind(0))


def _strides(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) * x.stride(0)


VMAPPED = {
    "shape": (_if_shape, "its control flow depends on shapes"),
    "no-grad": (_no_grad, "it switches gradients"),
    "isinstance": (_asks_type, "it asks for the type"),
    "lookup": (_looks_up, "dictionary key"),
    "assigns-buffer": (_assigns_buffer, "it assigns the buffer 'state'"),
    "writes-buffer": (_writes_buffer, "it writes into .*state'"),
    "iterates": (_iterates, "it iterates over a value"),
    "strides": (_strides, "order of its input in memory"),
}


class Inside(nn.Module):
    """The code as one module of a branch."""

    def __init__(self, code: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(4, 3), Forward(code), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(torch.tanh(self.before(x))))


@pytest.mark.parametrize("name", VMAPPED)
def test_fuse_falls_back_to_vmap(name: str) -> None:
    code, reason = VMAPPED[name]
    branches = [Inside(code).double() for _ in range(3)]
    with pytest.warns(UserWarning, match=f"Forward 'inner' cannot be traced \\(.*{reason}"):
        net = bsfast.fuse(branches)
    assert [row.kernel for row in net.report().rows if row.node == "inner"] == ["vmap"]
    for samples in (2, 5):
        x = torch.randn(samples, 4, dtype=torch.float64)
        want = ReferenceBranched(branches).branch_outputs(x)
        got = net.branch_outputs(x)
        torch.testing.assert_close(got, want)
        for parameter in net.parameters():
            parameter.grad = None
        got.sin().sum().backward()
        grads = [torch.autograd.grad(v.sin().sum(), list(b.parameters())) for b, v in zip(branches, want, strict=True)]
        for parameter, own in zip(net.parameters(), zip(*grads, strict=True), strict=True):
            torch.testing.assert_close(parameter.grad, torch.stack(own))
    torch.testing.assert_close(net.inner.state, torch.stack([b.inner.state for b in branches]))


@pytest.mark.parametrize("name", VMAPPED)
def test_fuse_falls_back_for_the_whole_branch(name: str) -> None:
    branches = [Forward(VMAPPED[name][0]) for _ in range(2)]
    with pytest.warns(UserWarning, match="the whole branch"):
        net = bsfast.fuse(branches)
    x = torch.randn(5, 3)
    torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))
    torch.testing.assert_close(net.state, torch.stack([b.state for b in branches]))
    assert net.report(x).rows[0].kernel == "vmap"


def test_vmapped_module_refuses_to_write_into_its_input() -> None:
    def code(_: Any, x: Tensor) -> Tensor:
        return x.mul_(2) if x.shape[0] > 0 else x

    with pytest.warns(UserWarning, match="cannot be traced"):
        net = bsfast.fuse([Inside(code) for _ in range(2)])
    with pytest.raises(ValueError, match="must not write into its input"):
        net(torch.randn(5, 4))


def test_vmapped_module_keeps_inner_modes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if x.shape[0] > 1 else x

    branches = [nn.Sequential(nn.Linear(3, 3), Block()) for _ in range(2)]
    for branch in branches:
        branch[1].norm.eval()
    with pytest.warns(UserWarning, match="Block '1'"):
        net = bsfast.fuse(branches)
    x = torch.randn(6, 3)
    torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))
    assert net.get_submodule("1.norm").num_batches_tracked.tolist() == [0, 0]


class LastOfLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class TiedByShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if x.shape[0] else x


@pytest.mark.parametrize(("make", "shape"), [(LastOfLSTM, (5, 6, 3)), (Attention, (5, 6, 4)), (TiedByShape, (5, 3))])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, of vmap
def test_torch_modules_without_a_rule_run_by_vmap(
    make: type[nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    branches = [make().double().train(training) for _ in range(3)]
    with pytest.warns(UserWarning, match="it runs as (torch.vmap of itself|a loop over branches)"):
        net = bsfast.fuse(branches)
    x = torch.randn(shape, dtype=torch.float64)
    want = ReferenceBranched(branches).branch_outputs(x)
    torch.testing.assert_close(net.branch_outputs(x), want)
    net(x).sin().sum().backward()
    want.sum(0).sin().sum().backward()
    for ours, *own in zip(net.parameters(), *(branch.parameters() for branch in branches), strict=True):
        torch.testing.assert_close(ours.grad, torch.stack([parameter.grad for parameter in own]))
