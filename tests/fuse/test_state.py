"""State that forward code keeps where torch.fx does not look is found: refused, or kept by vmap."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bsfast
from bsfast.fuse.trace import trace
from bsfast.nn.stacked import skeleton
from bsfast.reference import ReferenceBranched
from tests.fuse.forward_code import Forward, fuse_code


def _adds(name: str) -> Callable[[Any, Tensor], Tensor]:
    def code(m: Any, x: Tensor) -> Tensor:
        value = getattr(m, name)
        value += 1
        return m.linear(x) * float(value[0])

    return code


def _writes_listed(m: Any, x: Tensor) -> Tensor:
    m.listed[0].add_(1)
    return m.linear(x) + m.state


ATTRIBUTES: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[], Any]]] = {
    "count": (lambda m, x: m.linear(x) * next(m.kept), itertools.count),
    "generator": (lambda m, x: m.linear(x) * torch.rand(1, generator=m.kept), torch.Generator),
    "numpy-generator": (lambda m, x: m.linear(x) * float(m.kept.random()), lambda: np.random.default_rng(0)),
    "python-generator": (lambda m, x: m.linear(x) * m.kept.random(), lambda: random.Random(0)),
    "unused-draw": (lambda m, x: m.linear(x) * (1 if m.kept.random() < 0.99 else 2), lambda: random.Random(0)),
    "array": (_adds("kept"), lambda: np.zeros(1)),
    "tensor": (_adds("kept"), lambda: torch.zeros(1)),
    "deep": (lambda m, x: m.linear(x) * len(m.kept[0][0].append(1) or [1]), lambda: [[[]]]),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("num_branches", [1, 2])
def test_fuse_refuses_state_in_attributes(name: str, num_branches: int) -> None:
    code, make = ATTRIBUTES[name]
    with pytest.raises(ValueError, match="must not change Python attributes, got a change of 'kept'"):
        bsfast.fuse([Forward(code, kept=make()) for _ in range(num_branches)])


def test_fuse_refuses_writes_into_a_buffer_in_a_list() -> None:
    branches = [Forward(_writes_listed) for _ in range(2)]
    for branch in branches:
        branch.listed = [branch.state]
    with pytest.raises(ValueError, match="must not change Python attributes, got a change of 'listed'"):
        bsfast.fuse(branches)


def test_a_write_into_a_buffer_that_is_not_named_is_kept_by_vmap() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        next(m.buffers()).add_(1)
        return y * m.state

    branches = [Forward(code) for _ in range(2)]
    with pytest.warns(UserWarning, match="it writes into the buffer 'state'"):
        net = bsfast.fuse(branches)
    x = torch.randn(4, 3)
    for _ in range(2):
        torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))
    assert net.state.tolist() == [[2.0] * 3] * 2


def test_a_write_into_a_submodules_buffer_is_kept_by_vmap() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        next(m.norm.buffers()).add_(1)
        return m.norm(x)

    branches = [Forward(code, norm=torch.nn.BatchNorm1d(3)) for _ in range(2)]
    with pytest.warns(UserWarning, match="whole branch.*it writes into the buffer 'running_mean'"):
        net = bsfast.fuse(branches).eval()
    for branch in branches:
        branch.eval()
    x = torch.randn(4, 3)
    torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))


def test_fuse_refuses_late_registration() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        m.register_buffer("late", torch.ones(3))
        return m.linear(x) * m.late

    with pytest.raises(ValueError, match="must not register tensors, got the buffer 'late' in 'the branch'"):
        fuse_code(code)


COUNTER = itertools.count()
GENERATOR = torch.Generator()
MOVING: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "global": (lambda m, x: m.linear(x) * next(COUNTER), r"got node 'mul'.* with argument 1=\d+ first and \d+ then"),
    "constant": (
        lambda m, x: m.linear(x) * torch.rand(1, generator=GENERATOR),
        r"got _tensor_constant0=\[.*\] first and \[.*\] then",
    ),
    "operation": (
        lambda m, x: m.linear(x).sin() if next(COUNTER) % 2 else m.linear(x).cos(),
        r"got node '\w+' .* first and node '\w+' .* then",
    ),
}


@pytest.mark.parametrize("name", MOVING)
def test_fuse_refuses_what_moves_outside_the_module(name: str) -> None:
    code, message = MOVING[name]
    for num_branches in (1, 2):
        with pytest.raises(ValueError, match=f"must compute the same each time, {message}; register a buffer"):
            fuse_code(code, num_branches)


def test_trace_twice_keeps_constants() -> None:
    branch = skeleton(Forward(lambda m, x: m.linear(x) + torch.tensor([1.0, float("nan"), 3.0])))
    for twice in (True, False, True):
        graph, opaque = trace(branch, training=True, constants={}, twice=twice)
        assert [node.target for node in graph.nodes if node.op == "get_attr"] == ["_tensor_constant0"]
        assert not opaque
