"""The fused network equals the loop over branches: outputs, gradients, buffers, and weights after training."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import bsfast
from bsfast.reference import ReferenceBranched
from tests.networks import NETWORKS, Network

# float64 sums of under 10^4 terms of order 1, in another order: a few thousand times the unit roundoff 1e-16.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
BATCHES = (1, 17)  # contiguous memory; batch-last memory with a ragged last vector


def make_pair(network: Network, num_branches: int, training: bool = True) -> tuple[bsfast.Branched, ReferenceBranched]:
    branches = [network.make().double().train(training) for _ in range(num_branches)]
    if any(not parameter.is_leaf for branch in branches for parameter in branch.parameters()):
        raise AssertionError("cases must hold leaf parameters")
    return bsfast.fuse(branches), ReferenceBranched(branches)


def assert_same_outputs(got: Any, want: Any, **tolerance: Any) -> None:
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for ours, theirs in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **(tolerance or CLOSE))


def stacked(reference: ReferenceBranched, field: str) -> dict[str, Tensor]:
    """Gradients, parameters or buffers of all branches, stacked."""
    own = [dict(getattr(branch, f"named_{field}")(remove_duplicate=False)) for branch in reference.branches]
    return {name: torch.stack([entry[name] for entry in own]) for name in own[0]}


def loss_of(output: Any) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(output) if leaf.is_floating_point()]
    return sum((leaf.tanh() + 0.1 * leaf.sin()).mean() for leaf in leaves)  # bounded: no case diverges


def assert_same_state(net: bsfast.Branched, reference: ReferenceBranched, **tolerance: Any) -> None:
    want = stacked(reference, "parameters") | stacked(reference, "buffers")
    got = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name].detach(), tensor.detach(), **(tolerance or CLOSE), msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_gradients(net: bsfast.Branched, reference: ReferenceBranched) -> None:
    for name, parameter in net.named_parameters():
        own = [dict(branch.named_parameters())[name].grad for branch in reference.branches]
        want = torch.stack([torch.zeros_like(parameter[0]) if grad is None else grad for grad in own])
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's, of the reference
@pytest.mark.parametrize(
    ("num_branches", "training"),
    [(1, False), (2, True), (3, False), (16, True)],
    ids=["1-eval", "2-train", "3-eval", "16-train"],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_fuse_equals_reference(name: str, num_branches: int, training: bool) -> None:
    network = NETWORKS[name]
    net, reference = make_pair(network, num_branches, training)
    random = name.endswith("-Dropout") and training
    for samples in BATCHES:
        for per_branch in (False, True):
            leading = (num_branches,) if per_branch else ()
            inputs = network.draw(max(samples, network.smallest), *leading)
            if not network.integers:
                inputs = [x.requires_grad_() for x in inputs]
            copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            net.zero_grad()
            reference.zero_grad()
            if random:
                continue
            assert_same_outputs(
                net.branch_outputs(*inputs, per_branch=per_branch),
                reference.branch_outputs(*copies, per_branch=per_branch),
            )
            got, want = net(*inputs, per_branch=per_branch), reference(*copies, per_branch=per_branch)
            assert_same_outputs(got, want)
            if loss_of(want).requires_grad:
                loss_of(got).backward()
                loss_of(want).backward()
            assert_same_gradients(net, reference)
            for x, y in zip(inputs, copies, strict=True):
                torch.testing.assert_close(x.grad, y.grad, **CLOSE)
    assert_same_state(net, reference)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.endswith("-Dropout")])
def test_fuse_trains_as_reference(name: str) -> None:
    network = NETWORKS[name]
    net, reference = make_pair(network, 3)
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9) for module in (net, reference)]
    for step in range(20):
        inputs = network.draw(17 if step % 2 else max(3, network.smallest))
        for module, optimizer in zip((net, reference), optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(module(*inputs))
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
    assert_same_state(net, reference, rtol=1e-8, atol=1e-8)
