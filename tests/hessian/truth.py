"""Small networks, and their Hessians by functional autodiff of plain PyTorch modules.

The oracle is ``jacfwd(grad(.))``. ``torch.func.hessian`` is wrong for training-mode batch normalisation whose scale is
a parameter (test_products.py checks ours against double backward there).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import bsfast

CLASSES, SAMPLES, SIZE = 4, 5, 4


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Twice(nn.Conv2d):
    """One weight at two depths."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.weight, self.bias, padding=1).relu(), self.weight, self.bias, padding=1)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with values that are not trivial; ``train`` for the statistics of the batch."""

    def __init__(self, channels: int, train: bool = False) -> None:
        super().__init__(channels, track_running_stats=not train)
        nn.init.normal_(self.weight, 1, 0.3)
        nn.init.normal_(self.bias, 0, 0.3)
        if not train:
            self.running_mean.normal_(0, 0.3)
            self.running_var.uniform_(0.5, 2)


def relu_net(width: int = 2) -> nn.Sequential:
    """Convolution, batch normalisation, a residual block, pooling and two linear layers; piecewise linear."""
    block = Residual(nn.Conv2d(width, width, 3, padding=1), BatchNorm(width), nn.ReLU(inplace=True))
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), BatchNorm(width), nn.ReLU(), block, nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(width * (SIZE // 2) ** 2, 3), nn.LeakyReLU(0.2), nn.Linear(3, CLASSES),
    ).eval()  # fmt: skip


def tanh_net(width: int = 2, train: bool = True) -> nn.Sequential:
    """Smooth, and with batch normalisation by the statistics of the batch."""
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), BatchNorm(width, train), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(width * (SIZE // 2) ** 2, CLASSES),
    ).eval()  # fmt: skip


def between(*layers: nn.Module, width: int = 2) -> nn.Sequential:
    """A convolution, the layers in question, and a linear readout: the convolution's block is what they decide."""
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), *layers, nn.ReLU(), nn.Flatten(), nn.Linear(width * SIZE**2, CLASSES)
    ).eval()


def mse(f: Tensor, y: Tensor) -> Tensor:
    """``F.mse_loss``, of which jacfwd(grad(.)) fails in torch 2.13."""
    return (f - y).square().mean()


def make(branch: Callable[[], nn.Module], M: int = 2) -> tuple[bsfast.Branched, list[nn.Module]]:
    """A fused net and its branches."""
    net = bsfast.fuse([branch().double() for _ in range(M)])
    return net, bsfast.unfuse(net)


def batch(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 2, SIZE, SIZE, dtype=torch.float64), torch.randint(CLASSES, (samples,))


def as_function(
    branches: Sequence[nn.Module], names: Sequence[str] | None = None
) -> tuple[Callable[[Tensor, Tensor], list[Tensor]], Tensor, list[slice]]:
    """The branches' outputs as a function of one flat branch-major vector, that vector, and each branch's slice."""
    chosen = [{n: p.detach() for n, p in b.named_parameters() if names is None or n in names} for b in branches]
    chosen = [{n: own[n] for n in (names or own)} for own in chosen]
    others = [{n: t.detach() for n, t in [*b.named_parameters(), *b.named_buffers()]} for b in branches]
    sizes = [sum(p.numel() for p in own.values()) for own in chosen]
    theta = torch.cat([p.flatten() for own in chosen for p in own.values()])
    ends = torch.tensor(sizes).cumsum(0).tolist()

    def outputs(theta: Tensor, x: Tensor) -> list[Tensor]:
        results = []
        for branch, own, fixed, flat in zip(branches, chosen, others, theta.split(sizes), strict=True):
            parts = flat.split([p.numel() for p in own.values()])
            values = {n: t.view_as(p) for (n, p), t in zip(own.items(), parts, strict=True)}
            results.append(functional_call(branch, {**fixed, **values}, (x,)))
        return results

    return outputs, theta, [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def hessian(
    branches: Sequence[nn.Module], loss: Any, data: Any, names: Sequence[str] | None = None, *, reverse: bool = False
) -> Tensor:
    """The Hessian of the loss of the sum, ``(D, D)``; ``reverse`` for operators without forward mode."""
    outputs, theta, _ = as_function(branches, names)
    gradient = grad(lambda t: loss(sum(outputs(t, data[0])), data[1]))
    with sdpa_kernel(SDPBackend.MATH):
        return jacrev(gradient)(theta) if reverse else jacfwd(gradient)(theta)


def gauss_newton(branches: Sequence[nn.Module], loss: Any, data: Any, names: Sequence[str] | None = None) -> Tensor:
    """J^T L'' J."""
    outputs, theta, _ = as_function(branches, names)
    with sdpa_kernel(SDPBackend.MATH):
        J = jacrev(lambda t: sum(outputs(t, data[0])).flatten())(theta)
    f = sum(outputs(theta, data[0]))
    inner = jacfwd(grad(lambda u: loss(u.view_as(f), data[1])))(f.flatten())
    return J.mT @ inner @ J


def block_diagonal(matrix: Tensor, slices: Sequence[slice]) -> Tensor:
    return torch.block_diag(*[matrix[own, own] for own in slices])


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
