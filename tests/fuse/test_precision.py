"""In float32 a whole fused network is as close to float64 as stock float32 is."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched


def make_branch() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, following in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(channels, following, 3, padding=1), nn.BatchNorm2d(following), nn.Softplus()]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))


def gradients(net: nn.Module, x: Tensor) -> Tensor:
    net(x).square().mean().backward()
    if isinstance(net, ReferenceBranched):
        own = [[parameter.grad.double() for parameter in branch.parameters()] for branch in net.branches]
        return torch.cat([torch.stack(grads).flatten() for grads in zip(*own, strict=True)])
    return torch.cat([parameter.grad.double().flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("samples", [5, 33])
def test_fuse_float32_gradients_err_as_stock(samples: int) -> None:
    branches = [make_branch() for _ in range(4)]
    x = torch.randn(samples, 3, 8, 8)
    fused = gradients(bsfast.fuse(branches), x)
    truth = gradients(ReferenceBranched(copy.deepcopy(branches)).double(), x.double())
    stock = gradients(ReferenceBranched(branches), x)
    error, stock_error = ((own - truth).norm() / truth.norm() for own in (fused, stock))
    assert error <= 3 * stock_error
