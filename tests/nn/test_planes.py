"""Functions of single image planes on batch-last memory: the values of each branch, and the memory order stays."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bsfast
from bsfast.layout import is_batch_last, to_batch_last
from bsfast.nn import functional
from tests.cases import in_order


def joined(values_and_indices: tuple[Tensor, Tensor]) -> Tensor:
    values, indices = values_and_indices
    return values + 0.5 * indices.to(values.dtype)


PLANEWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "avg-pool": lambda x: F.avg_pool2d(x, 2),
    "avg-pool-padded": lambda x: F.avg_pool2d(x, (3, 2), 1, 1, ceil_mode=True, count_include_pad=False),
    "max-pool": lambda x: F.max_pool2d(x, 2),
    "max-pool-dilated": lambda x: F.max_pool2d(x, (2, 3), (2, 1), (1, 0), (1, 2)),
    "max-pool-indices": lambda x: joined(F.max_pool2d(x, 2, return_indices=True)),
    "lp-pool": lambda x: F.lp_pool2d(x.abs() + 1, 3, 2),
    "adaptive-avg-1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive-avg-1-1": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "adaptive-avg-3": lambda x: F.adaptive_avg_pool2d(x, (3, None)),
    "adaptive-max-1": lambda x: F.adaptive_max_pool2d(x, 1),
    "adaptive-max-indices": lambda x: joined(F.adaptive_max_pool2d(x, (2, 3), return_indices=True)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest-exact": lambda x: F.interpolate(x, size=(9, 3), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, size=(9, 11), mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=(3, 3), mode="area"),
    "antialiased": lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True),
    "zeros": lambda x: F.pad(x, (1, 2, 0, 1)),
    "cropped": lambda x: F.pad(x, (-1, 2), value=3.0),
    "reflect": lambda x: F.pad(x, (1, 2, 0, 1), "reflect"),
    "replicate": lambda x: F.pad(x, (1, 2, 0, 1), "replicate"),
    "circular": lambda x: F.pad(x, (1, 2, 0, 1), "circular"),
}
SHAPES = [(3, 17, 5, 7, 6), (1, 16, 3, 5, 5), (2, 33, 1, 6, 5)]


class Function(nn.Module):
    """A branch that is one function between two multiplications, so that gradients of every order are not trivial."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scale) * self.scale


def fused(name: str, num_branches: int) -> tuple[nn.Module, list[nn.Module]]:
    branches: list[nn.Module] = [Function(PLANEWISE[name]).double() for _ in range(num_branches)]
    return bsfast.fuse(branches), branches


@pytest.mark.parametrize("order", ["batch_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PLANEWISE)
def test_planes_and_their_gradients_are_those_of_the_branches(name: str, shape: tuple[int, ...], order: str) -> None:
    net, branches = fused(name, shape[0])
    x = in_order(torch.randn(shape, dtype=torch.float64), order).requires_grad_()
    own = x.detach().clone().requires_grad_()
    y = net.branch_outputs(x, per_branch=True)
    expected = torch.stack([branch(x_k) for branch, x_k in zip(branches, own, strict=True)])
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, own, cotangent, create_graph=True)
    torch.testing.assert_close(grad, expected_grad)
    scales = [branch.scale for branch in branches]
    (second,) = torch.autograd.grad(grad.square().sum(), net.scale)
    torch.testing.assert_close(second, torch.stack(torch.autograd.grad(expected_grad.square().sum(), scales)))


@pytest.mark.parametrize("name", PLANEWISE)
def test_planes_stay_batch_last(name: str) -> None:
    net, _ = fused(name, 3)
    leaf = net._run((to_batch_last(torch.randn(3, 17, 5, 7, 6, dtype=torch.float64)),), True, {})
    assert is_batch_last(leaf.tensor)


@pytest.mark.parametrize("name", ["avg-pool", "max-pool", "adaptive-avg-1", "nearest", "reflect"])
def test_planes_under_function_transforms(name: str) -> None:
    function, function_of_one = functional_form(name), PLANEWISE[name]
    x, v = (to_batch_last(torch.randn(3, 17, 2, 4, 5, dtype=torch.float64)) for _ in range(2))

    def loop(x: Tensor) -> Tensor:
        return torch.stack([function_of_one(x_k) for x_k in x])

    for got, want in zip(torch.func.jvp(function, (x,), (v,)), torch.func.jvp(loop, (x,), (v,)), strict=True):
        torch.testing.assert_close(got, want)
    both = torch.stack([x, v])
    torch.testing.assert_close(torch.func.vmap(function)(both), torch.stack([loop(x), loop(v)]))
    got, want = (torch.func.grad(lambda t, f=f: f(t).square().sum())(x) for f in (function, loop))
    torch.testing.assert_close(got, want)


def functional_form(name: str) -> Callable[[Tensor], Tensor]:
    if name == "adaptive-avg-1":
        return lambda x: functional.adaptive_avg_pool2d(x, 1)
    return lambda x: functional.over_planes(PLANEWISE[name], x)


def test_the_head_keeps_the_memory_order_of_gradients() -> None:
    x = to_batch_last(torch.randn(3, 17, 5, 4, 4)).requires_grad_()
    weight = torch.randn(3, 2, 5)
    scores = functional.linear(functional.adaptive_avg_pool2d(x, 1).flatten(2), weight)
    torch.testing.assert_close(scores, torch.einsum("mnc,moc->mno", x.mean((3, 4)), weight))
    seen = torch.autograd.grad(scores.sum(0).square().sum(), x)[0]
    assert seen.stride() == x.stride()
    flat = functional.linear(x.flatten(2), weight.repeat(1, 1, 16), torch.ones(3, 2))
    torch.testing.assert_close(flat, x.flatten(2) @ weight.repeat(1, 1, 16).mT + 1)
    assert torch.autograd.grad(flat.square().sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_pad_keeps_a_shared_batch_last_image(mode: str) -> None:
    x = to_batch_last(torch.randn(17, 3, 5, 4))
    padded = functional.pad(x, (1, 2, 0, 1), mode)
    torch.testing.assert_close(padded, F.pad(x.contiguous(), (1, 2, 0, 1), mode))
    assert is_batch_last(padded)


def test_over_planes_copies_nothing() -> None:
    x, seen = to_batch_last(torch.randn(3, 17, 5, 4, 4)), []

    def same(images: Tensor) -> Tensor:
        seen.append(images)
        return images

    y = functional.over_planes(same, x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert y.data_ptr() == seen[0].data_ptr() == x.data_ptr()
    assert torch.equal(y, x)
