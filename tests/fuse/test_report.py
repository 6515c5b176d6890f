"""``report`` tells the truth about every node and changes nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bsfast
from tests.networks import NETWORKS, Residual


@pytest.mark.parametrize("name", NETWORKS)
def test_report_has_no_side_effects(name: str) -> None:
    network = NETWORKS[name]
    net = bsfast.fuse(network.make, num_branches=2)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    inputs = network.draw(17, dtype=torch.float32)
    drawn = torch.get_rng_state()
    table = net.report(*inputs)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(state, drawn)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    kernels = {row.kernel for row in table.rows}
    assert kernels <= {"native", "loop", "grouped", "aten", "vmap", "batch_last", "contiguous"}
    assert str(table).splitlines()[0].split() == ["node", "operation", "kernel", "reason"]


def test_report_needs_an_input_to_know_convolutions() -> None:
    net = bsfast.fuse(Residual, num_branches=2)
    assert [row.kernel for row in net.report().rows if row.node == "conv1"] == ["?"]
    net(torch.randn(17, 3, 6, 6))
    rows = {row.node: row for row in net.report().rows}
    assert rows["conv1"][2:] == ("native", "batch-last: samples in the vector lanes; describes its result")
    assert "x" in rows
    small = {row.node: row for row in net.report(torch.randn(3, 3, 6, 6)).rows}
    assert small["conv1"][2:] == ("native", "batch-last: columns and samples in the vector lanes; describes its result")
    half = {row.node: row for row in net.bfloat16().report(torch.randn(17, 3, 6, 6, dtype=torch.bfloat16)).rows}
    assert half["x"].kernel == "contiguous"
    assert half["conv1"][2:] == ("grouped", "torch.bfloat16 has no own kernel")


def test_report_names_what_runs_by_vmap() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    net = bsfast.fuse([nn.Sequential(nn.Linear(3, 3), Product()) for _ in range(2)])
    assert [(r.node, r.kernel, r.reason) for r in net.report().rows][-1] == (
        "1: cumsum",
        "vmap",
        "no rule for this function",
    )


def test_report_takes_arguments_like_forward() -> None:
    net = bsfast.fuse(NETWORKS["adain"].make, num_branches=2)
    x, style = torch.randn(2, 5, 3, 7, 5), torch.randn(5, 4)
    rows = net.report(x, style, per_branch=[True, False]).rows
    assert [row.node for row in rows][:3] == ["x", "style", "conv"]
    with pytest.raises(TypeError, match="must get the input 'style'"):
        net.report(x)
