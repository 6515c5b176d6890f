"""Modules that run by vmap or as a loop: they see what they would see alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast
from tests.fuse.forward_code import Forward, fuse_code
from tests.fuse.same import assert_same


def _asks_parameter(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) * (2 if x.shape[0] > 0 and m.linear.weight.requires_grad else 1)


def _asks_result(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y * (2 if x.shape[0] > 0 and y.requires_grad else 1) + (3 if m.state.requires_grad else 0)


def _asks_input(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) * (2 if x.shape[0] > 0 and x.requires_grad else 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("code", [_asks_parameter, _asks_result, _asks_input])
def test_vmapped_modules_know_what_requires_gradients(code: Callable[[Any, Tensor], Tensor], frozen: bool) -> None:
    branches = [nn.Sequential(Forward(code)) for _ in range(2)]
    for branch in branches:
        branch.requires_grad_(not frozen)
    x = torch.randn(4, 3)
    net = assert_same(branches, x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), sum(branch(x) for branch in branches))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x)


@pytest.mark.parametrize("make", [Encoder, Attends, lambda: nn.TransformerEncoder(Encoder().layer, 2)])
def test_attention_runs_as_a_loop(make: Callable[[], nn.Module]) -> None:
    branches = [make().double() for _ in range(2)]
    with pytest.warns(UserWarning, match="it runs as a loop over branches") as seen:
        net = bsfast.fuse(copy.deepcopy(branches))
    assert len(seen) == 1
    assert "loop" in {row.kernel for row in net.report().rows}
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    assert_same(branches, x)
    for module in (net, *branches):
        module.eval()
    with torch.no_grad():  # the fast path of inference
        torch.testing.assert_close(
            torch.utils._pytree.tree_leaves(net(x)),
            [sum(parts) for parts in zip(*(torch.utils._pytree.tree_leaves(b(x)) for b in branches), strict=True)],
        )


def test_parameters_used_in_python_run_by_vmap() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        for name, parameter in m.named_parameters():
            y = y + parameter.sum() if name.endswith("bias") else y
        return y

    with pytest.warns(UserWarning, match="cannot be traced .*computes with parameters in Python"):
        net = fuse_code(code)
    assert "vmap" in {row.kernel for row in net.report().rows}
    assert_same([nn.Sequential(nn.Linear(3, 3), Forward(code)) for _ in range(2)], torch.randn(4, 3))
