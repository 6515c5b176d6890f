"""``unfuse`` gives back the branches bit for bit, and a fused network is an ordinary module to the rest of torch."""

import copy
import io

import pytest
import torch
from torch import nn

import bsfast
from bsfast.reference import ReferenceBranched
from tests.networks import NETWORKS, Residual, Tied

PICKLABLE = {name: network for name, network in NETWORKS.items() if not name.startswith("code-")}


@pytest.mark.parametrize("name", NETWORKS)
def test_unfuse_is_bit_for_bit(name: str) -> None:
    branches = [NETWORKS[name].make() for _ in range(3)]
    for k, branch in enumerate(branches):
        for buffer in branch.buffers():
            buffer.add_(k)
    back = bsfast.unfuse(bsfast.fuse(branches))
    assert len(back) == 3
    for ours, theirs in zip(back, branches, strict=True):
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)
        state = theirs.state_dict()
        assert list(ours.state_dict()) == list(state)
        for key, tensor in ours.state_dict().items():
            assert tensor.dtype == state[key].dtype
            assert torch.equal(tensor, state[key])
            assert tensor.data_ptr() != state[key].data_ptr()


def test_unfuse_returns_what_was_trained() -> None:
    branches = [Residual() for _ in range(2)]
    net = bsfast.fuse(branches)
    net(torch.randn(17, 3, 6, 6)).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    net.eval()
    net.bn1.train()
    net.conv1.weight.requires_grad_(False)
    net.double()
    back = bsfast.unfuse(net)
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(
        torch.stack([branch.eval()(x) for branch in copy.deepcopy(back)]), net.eval().branch_outputs(x)
    )
    assert [back[0].training, back[0].bn1.training, back[0].bn2.training] == [False, True, False]
    assert not back[1].conv1.weight.requires_grad
    assert back[1].conv2.weight.requires_grad
    assert back[0].relu.inplace


def test_unfuse_keeps_ties() -> None:
    net = bsfast.fuse([Tied() for _ in range(2)])
    assert net.first.weight is net.second.weight
    assert net.again is net.first
    for branch in bsfast.unfuse(net):
        assert branch.first.weight is branch.second.weight
        assert branch.again is branch.first


def test_unfuse_refuses_other_modules() -> None:
    with pytest.raises(TypeError, match=r"unfuse: net must be a bsfast.Branched, got Linear"):
        bsfast.unfuse(nn.Linear(1, 1))


@pytest.mark.parametrize("name", PICKLABLE)
def test_branched_survives_copies(name: str) -> None:
    network = PICKLABLE[name]
    net = bsfast.fuse(network.make, num_branches=2).eval()
    inputs = network.draw(17, dtype=torch.float32)
    want = torch.utils._pytree.tree_leaves(net.branch_outputs(*inputs))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    other = bsfast.fuse(network.make, num_branches=2).eval()
    other.load_state_dict(net.state_dict())
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False), other):
        got = torch.utils._pytree.tree_leaves(twin.branch_outputs(*inputs))
        assert all(map(torch.equal, got, want)) or name == "text"  # its plain tensors are in no state_dict; equal here
        assert twin.state_dict().keys() == net.state_dict().keys()


def test_state_dict_has_the_branches_names() -> None:
    branch = Residual()
    net = bsfast.fuse([branch, Residual()])
    assert {name: tensor.shape[1:] for name, tensor in net.state_dict().items()} == {
        name: tensor.shape for name, tensor in branch.state_dict().items()
    }


def test_non_persistent_buffers_stay_so() -> None:
    net = bsfast.fuse([NETWORKS["code-arithmetic"].make() for _ in range(2)])
    assert "shift" not in net.state_dict()
    assert net.shift.shape == (2, 6)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_elementwise_optimizers_act_as_separate_ones(optimizer: type[torch.optim.Optimizer]) -> None:
    branches = [Residual().double() for _ in range(3)]
    net = bsfast.fuse(branches)
    fused = optimizer(net.parameters(), lr=1e-3)
    separate = [optimizer(branch.parameters(), lr=1e-3) for branch in branches]
    for _ in range(5):
        x = torch.randn(17, 3, 6, 5, dtype=torch.float64)
        fused.zero_grad()
        net(x).square().mean().backward()
        fused.step()
        for single in separate:
            single.zero_grad()
        ReferenceBranched(branches)(x).square().mean().backward()
        for single in separate:
            single.step()
    for ours, theirs in zip(bsfast.unfuse(net), branches, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_frozen_batchnorm_in_a_training_network() -> None:
    branches = [Residual() for _ in range(2)]
    net = bsfast.fuse(branches)
    net.bn1.eval()
    for branch in branches:
        branch.bn1.eval()
    x = torch.randn(17, 3, 6, 6)
    torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))
    assert net.bn1.num_batches_tracked.tolist() == [0, 0]
    assert net.bn2.num_batches_tracked.tolist() == [1, 1]


def test_batches_tracked_may_differ_between_branches() -> None:
    branches = [nn.Sequential(nn.BatchNorm1d(3, momentum=None)).double() for _ in range(2)]
    branches[1](torch.randn(7, 3, dtype=torch.float64))
    net, reference = bsfast.fuse(branches), ReferenceBranched(branches)
    for _ in range(3):
        x = torch.randn(7, 3, dtype=torch.float64)
        torch.testing.assert_close(net.branch_outputs(x), reference.branch_outputs(x))
    torch.testing.assert_close(net.get_submodule("0").running_var, torch.stack([b[0].running_var for b in branches]))
    assert net.get_submodule("0").num_batches_tracked.tolist() == [3, 4]


def test_branched_moves_to_meta() -> None:
    with torch.device("meta"):
        net = bsfast.fuse(Residual, num_branches=2)
        assert net(torch.randn(17, 3, 6, 6)).is_meta
    net = bsfast.fuse(Residual, num_branches=2).to("meta")
    assert net.branch_outputs(torch.randn(3, 3, 6, 6, device="meta")).shape == (2, 3, 5)


def test_zero_samples() -> None:
    branches = [Residual().eval() for _ in range(2)]
    net, x = bsfast.fuse(branches), torch.randn(0, 3, 6, 6)
    assert net.branch_outputs(x).shape == ReferenceBranched(branches).branch_outputs(x).shape


@pytest.mark.parametrize(
    "name",
    [
        "residual-block",
        "norm-instancenorm-affine-stats",
        "norm-batchnorm-cumulative",
        "mlp",
        "norm-groupnorm",
        "norm-layernorm",
        "activation-21-PReLU",
        "code-functional-layers",
    ],
)
def test_autocast_gives_the_branches_dtypes(name: str) -> None:
    network = NETWORKS[name]
    branches = [network.make() for _ in range(2)]
    net, reference = bsfast.fuse(branches), ReferenceBranched(branches)
    for samples in (3, 17):
        (x,) = network.draw(samples, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = net.branch_outputs(x), reference.branch_outputs(x)
        assert got.dtype == want.dtype
        assert (got - want).norm() < 0.02 * want.norm()  # bfloat16 has 8 bits
        got.float().sum().backward()
    for buffer in net.buffers():
        assert buffer.dtype in {torch.float32, torch.int64}
