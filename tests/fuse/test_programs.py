"""A network keeps as many traces as it needs, and no more than a bound."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.fuse.branched import MOST_PROGRAMS


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, mode: str = "a", temperature: float = 1.0) -> Tensor:
        return self.linear(x) * torch.tensor([temperature, 1.0, 2.0]) + (mode == "b")


def test_programs_are_bounded_and_the_argument_named_once() -> None:
    branches = [Annealed() for _ in range(2)]
    net: Any = bsfast.fuse(branches)
    x = torch.randn(4, 3)

    def call_all(steps: range) -> None:
        for step in steps:
            rest = ("b" if step % 2 else "a", step / 7)
            torch.testing.assert_close(net(x, *rest), sum(branch(x, *rest) for branch in branches))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_all(range(MOST_PROGRAMS - 2))
    with pytest.warns(UserWarning, match=f"more than {MOST_PROGRAMS} .* of 'temperature'.*pass it as a tensor") as seen:
        call_all(range(1000, 1000 + 2 * MOST_PROGRAMS))
    assert len(seen) == 1
    assert len(net._programs) == MOST_PROGRAMS
    assert len([name for name, _ in net.named_buffers() if name.startswith("_constant")]) <= MOST_PROGRAMS
    call_all(range(1))
    assert len(bsfast.unfuse(net)) == 2


def test_the_program_in_use_stays() -> None:
    net: Any = bsfast.fuse([Annealed() for _ in range(2)])
    x = torch.randn(4, 3)
    first = net._program(net._arguments.default_constants())

    def call_all() -> None:
        for step in range(2 * MOST_PROGRAMS):
            net(x, "a", step + 0.5)
            net(x)

    with pytest.warns(UserWarning, match="temperature"):
        call_all()
    assert net._program(net._arguments.default_constants()) is first
