"""Where torch.fx or broadcasting would be silently wrong: constants, modes, aliases, dtypes, axes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched
from tests.fuse.forward_code import Forward, fuse_code


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, mode: str = "a") -> Tensor:
        y = self.linear(x) * torch.tensor(scale)
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        y = y + torch.tensor([1.0, 2.0, 3.0]) if self.training else y + torch.tensor([4.0, 5.0, 6.0])
        return y if mode == "a" else y.exp()


def test_branched_retraces_for_each_constant() -> None:
    branches = [Flags() for _ in range(2)]
    net, reference = bsfast.fuse(branches), ReferenceBranched(branches)
    x, mask = torch.randn(5, 3), torch.randn(5, 3) > 0
    calls = (
        ((), {}),
        ((mask,), {}),
        ((None, 2.0), {}),
        ((), {"mode": "b"}),
        ((), {"mask": mask, "scale": 3.0}),
        ((), {}),
    )
    for training in (True, False, True):
        net.train(training)
        reference.train(training)
        for rest, named in calls:
            torch.testing.assert_close(
                net.branch_outputs(x, *rest, **named), reference.branch_outputs(x, *rest, **named)
            )
    with pytest.raises(TypeError, match="scale must be a tensor or hashable, got list"):
        net(x, scale=[1.0])


def test_vmapped_branch_gets_its_constants() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x * scale if x.shape[0] > 0 else x

    with pytest.warns(UserWarning, match="cannot be traced"):
        net = bsfast.fuse([Untraceable() for _ in range(2)])
    assert net(torch.ones(3), 5.0).tolist() == [10.0] * 3


def test_constants_that_compare_equal_are_told_apart() -> None:
    class Typed(nn.Module):
        def forward(self, x: Tensor, scale: Any = None) -> Tensor:
            return x * (10 if scale is True else 1)

    net = bsfast.fuse([Typed()])
    assert net(torch.ones(1), 1).item() == 1
    assert net(torch.ones(1), True).item() == 10


def test_modes_of_containers_are_checked_where_they_matter() -> None:
    class Moded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training else x

    net = bsfast.fuse([nn.Sequential(Moded(), nn.Linear(3, 3)) for _ in range(2)])
    net.get_submodule("0").eval()
    with pytest.raises(ValueError, match="got training=False at '0' and True at the top"):
        net(torch.randn(2, 3))


def test_fuse_inside_no_grad_still_sees_no_grad_blocks() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = m.linear(x).abs().mean()
        return m.linear(x) / scale

    branches = [Forward(code) for _ in range(2)]
    with torch.no_grad(), pytest.warns(UserWarning, match="it switches gradients"):
        bsfast.fuse(branches)


def test_shared_value_cast_to_a_parameter_stays_shared() -> None:
    branches = [Forward(lambda m, x: x.type_as(m.state) @ m.linear.weight) for _ in range(4)]
    x = torch.randn(4, 3)  # N = M: taken for a stacked tensor, it would pass unnoticed
    torch.testing.assert_close(bsfast.fuse(branches).branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))


def test_rank_0_parameters_do_not_promote() -> None:
    branches = [Forward(lambda m, x: m.linear(x) * m.state.double().sum()) for _ in range(2)]
    assert bsfast.fuse(branches)(torch.randn(4, 3)).dtype == torch.float32


def test_inplace_arithmetic_keeps_dtype_and_shape() -> None:
    def promotes(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        y += m.state.double()
        return y

    def broadcasts(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x).mean(1, keepdim=True)
        y += m.state
        return y

    assert fuse_code(promotes)(torch.randn(4, 3)).dtype == torch.float32
    with pytest.raises(ValueError, match="an in-place operation must keep the shape"):
        fuse_code(broadcasts)(torch.randn(4, 3))


def test_augmented_assignment_is_seen_under_every_name() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        also_y, size = y, y.size(1)
        same_size = size
        size += 1
        y += 1
        return also_y * same_size + y * size

    branches = [Forward(code) for _ in range(2)]
    x = torch.randn(4, 3)
    torch.testing.assert_close(bsfast.fuse(branches).branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))
    with pytest.raises(ValueError, match="must not write into its input, got in-place 'iadd"):
        fuse_code(_adds_to_input)


def _adds_to_input(m: Any, x: Tensor) -> Tensor:
    x += m.linear(x)
    return x


@pytest.mark.parametrize("code", [lambda m, x: m.linear(x).mean(-3), lambda m, x: m.linear(x).unsqueeze(-4)])
def test_axes_never_reach_the_branch_axis(code: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(IndexError, match="Dimension out of range"):
        fuse_code(code)(torch.randn(4, 3))


def test_embedding_rows_stay_inside_a_branch() -> None:
    net = bsfast.fuse([nn.Sequential(nn.Embedding(5, 2)) for _ in range(3)])
    with pytest.raises(IndexError, match="out of range"):
        net(torch.tensor([[5], [0], [0]]), per_branch=True)  # row 5 is the next branch's first
    with pytest.raises(ValueError, match="sparse must be unset"):
        bsfast.fuse([nn.Sequential(nn.Embedding(5, 2, sparse=True))])(torch.tensor([1]))


def test_fuse_leaves_the_branches_alone() -> None:
    branches = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2)]
    before = copy.deepcopy([branch.state_dict() for branch in branches])
    state = torch.get_rng_state()
    net = bsfast.fuse(branches)
    assert torch.equal(torch.get_rng_state(), state)
    net(torch.randn(4, 3)).sum().backward()
    torch.optim.SGD(net.parameters(), 1.0).step()
    for branch, kept in zip(branches, before, strict=True):
        assert all(parameter.grad is None for parameter in branch.parameters())
        assert all(torch.equal(tensor, kept[name]) for name, tensor in branch.state_dict().items())
