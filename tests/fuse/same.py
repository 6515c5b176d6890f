"""Is a fused network the loop over its branches? Outputs, gradients, buffers and modes."""

import io
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bsfast
from bsfast.reference import ReferenceBranched


def assert_same(
    branches: Sequence[nn.Module],
    *inputs: Tensor,
    modes: Sequence[bool] = (True, False, True),
    net: bsfast.Branched | None = None,
) -> bsfast.Branched:
    """Run both twice in each mode; returns the fused network."""
    if net is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "bsfast: .* cannot be traced", UserWarning)
            net = bsfast.fuse(branches)
    reference = ReferenceBranched(branches)
    for mode in modes:
        net.train(mode)
        for branch in branches:
            branch.train(mode)
        for _ in range(2):
            ours, theirs = ([_leaf(x) for x in inputs] for _ in range(2))
            torch.manual_seed(1)
            got = net.branch_outputs(*ours)
            torch.manual_seed(1)
            want = reference.branch_outputs(*theirs)
            torch.testing.assert_close(got, want)
            _backward(got, net)
            _backward(want, reference)
            f = _forward_without_updates(net, ours)
            torch.testing.assert_close(f, pytree.tree_map(lambda v: v.sum(0).detach(), want))
            for x, own in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x.grad, own.grad)
            for name, parameter in net.named_parameters():
                grads = [branch.get_parameter(name).grad for branch in branches]
                expected = None if grads[0] is None else torch.stack(grads)
                torch.testing.assert_close(parameter.grad, expected)
            for branch, back in zip(branches, bsfast.unfuse(net), strict=True):
                assert {n: m.training for n, m in back.named_modules()} == {
                    n: m.training for n, m in branch.named_modules()
                }
                torch.testing.assert_close(back.state_dict(), branch.state_dict())
    return net


def saved(net: bsfast.Branched) -> bsfast.Branched:
    """Save and load the whole network."""
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded: bsfast.Branched = torch.load(file, weights_only=False)
    return loaded


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _forward_without_updates(net: bsfast.Branched, inputs: list[Tensor]) -> object:
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    torch.manual_seed(1)
    result = net(*inputs)
    for name, buffer in net.named_buffers():
        buffer.copy_(before[name])
    return pytree.tree_map(lambda v: v.detach(), result)


def _backward(outputs: object, module: nn.Module) -> None:
    module.zero_grad()
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if leaf.requires_grad]
    if leaves:
        torch.stack([leaf.sin().sum() for leaf in leaves]).sum().backward()
