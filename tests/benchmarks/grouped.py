"""M branches as one network of grouped layers on ``(N, M * C, H, W)``: the usual way to do it by hand."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSE_CHANNELS = 96


class Grouped(nn.Module):
    """f(x) from branches whose forward code works on any number of channels and reaches parameters by modules only.

    The modules of the first branch are replaced by wider ones. Those in ``shared`` take the network's input, which has
    the channels of one branch, so they need no groups. ``merged`` makes convolutions :class:`MergedConv2d`.
    """

    def __init__(self, branches: Sequence[nn.Module], shared: Sequence[str], *, merged: bool = False) -> None:
        super().__init__()
        self.num_branches = len(branches)
        self.net = copy.deepcopy(branches[0])
        for path, module in branches[0].named_modules():
            if type(module) in WIDER:
                same = [branch.get_submodule(path) for branch in branches]
                wider = WIDER[type(module)](same, path in shared)
                dense = merged and isinstance(wider, nn.Conv2d) and wider.groups > 1
                self.net.set_submodule(path, MergedConv2d(wider) if dense else wider)
        kinds = {type(module) for module in branches[0].modules() if list(module.parameters(recurse=False))}
        if kinds - set(WIDER):
            raise TypeError(f"Grouped: modules with parameters must be of {list(WIDER)}, got {kinds - set(WIDER)}")

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(*inputs).unflatten(1, (self.num_branches, -1)).sum(1)


class GroupedLinear(nn.Module):
    """Maps ``(N, M * C_in)`` to ``(N, M * C_out)``, every group of features by its own matrix."""

    def __init__(self, branches: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([branch.weight.detach() for branch in branches]))
        self.bias = nn.Parameter(torch.stack([branch.bias.detach() for branch in branches])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        return torch.baddbmm(self.bias, x, self.weight.mT).transpose(0, 1).flatten(1)


class MergedConv2d(nn.Module):
    """A grouped convolution whose groups run together, as block-diagonal dense ones of about 96 channels.

    It multiplies by many zeros, which matrix units do faster than narrow groups. Parameters are the blocks.

    Source: arXiv 1803.09926.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        channels = max(conv.in_channels, conv.out_channels) / conv.groups
        sizes = [size for size in range(1, conv.groups + 1) if conv.groups % size == 0]
        self.merged = min(sizes, key=lambda size: abs(math.log(size * channels / DENSE_CHANNELS)))

    def forward(self, x: Tensor) -> Tensor:
        own, block = self.conv, self.conv.weight
        blocks = block.view(-1, self.merged, own.out_channels // own.groups, 1, *block.shape[1:])
        diagonal = torch.eye(self.merged, dtype=block.dtype, device=block.device).view(-1, 1, self.merged, 1, 1, 1)
        dense = (blocks * diagonal).flatten(3, 4).flatten(0, 2)
        if not block.is_contiguous():
            dense = dense.contiguous(memory_format=torch.channels_last)
        groups = own.groups // self.merged
        return F.conv2d(x, dense, own.bias, own.stride, own.padding, own.dilation, groups)


def _convolution(branches: Sequence[nn.Conv2d], shared: bool) -> nn.Module:
    one, M = branches[0], len(branches)
    in_channels, groups = (one.in_channels, 1) if shared else (M * one.in_channels, M)
    geometry = (one.kernel_size, one.stride, one.padding, one.dilation)
    merged = nn.Conv2d(in_channels, M * one.out_channels, *geometry, groups, bias=one.bias is not None)
    return _concatenated(merged, branches)


def _linear(branches: Sequence[nn.Linear], shared: bool) -> nn.Module:
    if not shared:
        return GroupedLinear(branches)
    one = branches[0]
    merged = nn.Linear(one.in_features, len(branches) * one.out_features, bias=one.bias is not None)
    return _concatenated(merged, branches)


def _batch_norm(branches: Sequence[nn.BatchNorm2d], _: bool) -> nn.Module:
    one = branches[0]
    merged = nn.BatchNorm2d(len(branches) * one.num_features, one.eps, one.momentum, one.affine)
    return _concatenated(merged, branches)


def _instance_norm(branches: Sequence[nn.InstanceNorm2d], _: bool) -> nn.Module:
    one = branches[0]
    merged = nn.InstanceNorm2d(len(branches) * one.num_features, one.eps, affine=one.affine)
    return _concatenated(merged, branches)


def _concatenated(merged: nn.Module, branches: Sequence[nn.Module]) -> nn.Module:
    """Give a layer the values of M narrower ones; counters, which have no axis, are those of the first."""
    states = [branch.state_dict() for branch in branches]
    merged.load_state_dict({
        name: torch.cat([state[name] for state in states]) if value.dim() else value
        for name, value in states[0].items()
    })
    return merged


WIDER: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.InstanceNorm2d: _instance_norm,
}
