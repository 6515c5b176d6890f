"""Results are ordinary tensors: contiguous, and their memory is their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched
from tests.fuse.forward_code import Forward


class Code(nn.Module):
    def __init__(self, code: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.weight, self.code = nn.Conv2d(3, 3, 3, padding=1), nn.Parameter(torch.randn(3, 1, 1)), code

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def _two(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return y, {"same": y, "view": y.flatten(1)}, [x, x]


CODES: dict[str, Callable[[Any, Tensor], Any]] = {
    "identity": lambda m, x: x,
    "view": lambda m, x: x.flatten(1).view(x.shape),
    "parameter": lambda m, x: m.weight,
    "parameter-view": lambda m, x: m.weight.expand(2, 3, 4, 5),
    "images": lambda m, x: m.conv(x),
    "sum": lambda m, x: m.conv(x).sum(),
    "shared": lambda m, x: 2 * x,
    "shared-transposed": lambda m, x: (2 * x).transpose(1, 3),
    "vmap-identity": lambda m, x: x if x.shape[0] > 0 else 2 * x,
    "vmap-parameter": lambda m, x: m.weight if x.shape[0] > 0 else 2 * x,
    "several": _two,
}


@pytest.mark.filterwarnings("ignore:bsfast. Code .*cannot be traced:UserWarning")
@pytest.mark.parametrize("num_branches", [1, 3])
@pytest.mark.parametrize("per_branch", [False, True])
@pytest.mark.parametrize("name", CODES)
def test_results_own_their_memory(name: str, per_branch: bool, num_branches: int) -> None:
    branches = [Code(CODES[name]) for _ in range(num_branches)]
    net = bsfast.fuse(branches)
    x = torch.randn(*((num_branches,) if per_branch else ()), 17, 3, 4, 5)
    before = {name: tensor.clone() for name, tensor in {**net.state_dict(), "x": x}.items()}
    for method in ("branch_outputs", "forward"):
        got = getattr(net, method)(x, per_branch=per_branch)
        want = getattr(ReferenceBranched(branches), method)(x, per_branch=per_branch)
        torch.testing.assert_close(got, want)
        leaves, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (got, want))
        with torch.no_grad():
            for k, (leaf, other) in enumerate(zip(leaves, expected, strict=True)):
                assert leaf.is_contiguous()
                leaf.view(-1).fill_(k)
                other.view(-1).fill_(k)
        torch.testing.assert_close(leaves, expected)  # writing into one is seen in no other
        for key, tensor in {**net.state_dict(), "x": x}.items():
            assert torch.equal(tensor, before[key])


def test_results_of_linear_layers_are_not_copied() -> None:
    net = bsfast.fuse([nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)])
    with torch.profiler.profile() as profile:
        net.branch_outputs(torch.randn(5, 3))
        net(torch.randn(5, 3))
    first_layer = 2  # one copy to bring the shared input's result into order, in each call
    assert sum(event.count for event in profile.key_averages() if event.key in {"aten::clone", "aten::copy_"}) <= (
        2 * first_layer
    )


@pytest.mark.parametrize("code", [lambda m, x: x, lambda m, x: m.linear(x).T, lambda m, x: (x + 1, m.linear.weight)])
def test_results_under_vmap_and_compile(code: Callable[[Any, Tensor], Any]) -> None:
    torch._dynamo.reset()
    net = bsfast.fuse([Forward(code) for _ in range(2)])
    several = torch.randn(4, 5, 3)
    mapped = torch.vmap(net.branch_outputs)(several)
    each = [net.branch_outputs(x) for x in several]
    torch.testing.assert_close(mapped, torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *each))
    compiled = torch.compile(net.branch_outputs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(several[0]), each[0])
