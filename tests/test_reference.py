"""The specification, against its one-line definition."""

import pytest
import torch
from torch import Tensor, nn

from bsfast.reference import ReferenceBranched


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"v": self.linear(x) * y * scale, "x": x}


def test_reference_is_the_sum_over_branches() -> None:
    branches = [nn.Linear(3, 2) for _ in range(4)]
    net, x = ReferenceBranched(branches), torch.randn(5, 3)
    assert torch.equal(net.branch_outputs(x), torch.stack([branch(x) for branch in branches]))
    torch.testing.assert_close(net(x), branches[0](x) + branches[1](x) + branches[2](x) + branches[3](x))
    assert net.branches[2] is branches[2]


def test_reference_takes_an_input_per_branch() -> None:
    branches = [TwoInputs() for _ in range(3)]
    net, x, y = ReferenceBranched(branches), torch.randn(3, 5, 3), torch.randn(5, 2)
    got = net.branch_outputs(x, y, 2.0, per_branch=[True, False, False])
    assert torch.equal(got["v"], torch.stack([branch(x[k], y, 2.0)["v"] for k, branch in enumerate(branches)]))
    both = net.branch_outputs(x, y=y.expand(3, 5, 2), per_branch=True)
    assert torch.equal(both["v"] * 2, got["v"])
    assert torch.equal(net(x, y.expand(3, 5, 2), per_branch=True)["x"], x.sum(0))


def test_reference_refuses_no_branches() -> None:
    with pytest.raises(ValueError, match="ReferenceBranched: branches must hold at least one module, got none"):
        ReferenceBranched([])
    with pytest.raises(ValueError, match="zip"):
        ReferenceBranched([nn.Linear(3, 2)])(torch.ones(1, 3), per_branch=[True, False])
