"""Triton's normalisation of samples called directly, on a GPU or interpreted: values, merged tiles, repeatability."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast import ops
from bsfast.nn import functional
from tests.cases import in_order
from tests.ops.test_batch_norm_triton import DEVICE, DTYPES, ORDERS, WHY_NOT, assert_close

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no Triton kernels: {WHY_NOT}")

# (M, N, C, H, W) and groups; more samples than a tile has lanes, and images of more than one tile.
CASES = [
    ((2, 17, 4, 5, 4), 2),
    ((1, 70, 3, 3, 3), 3),
    ((2, 1, 6, 6, 5), 3),
    ((3, 2, 2, 1, 5), 1),
    ((1, 2, 2, 70, 67), 2),
]


class Problem:
    """Operands, and the truth in float64; ``kind`` is what there is a coefficient for."""

    def __init__(self, shape, groups, order, dtype, *, kind="sample", slope=0.2, own=None) -> None:
        self.groups, self.slope = groups, slope
        self.x = in_order((2 * torch.randn(shape, dtype=torch.float64) + 3).to(dtype), order).requires_grad_()
        sizes = {"channel": (shape[0], shape[2]), "sample": shape[:3]}[kind]
        self.affine = [torch.randn(sizes).to(own or dtype).requires_grad_() for _ in range(2)]
        self.leaves = [t.detach().double().requires_grad_() for t in (self.x, *self.affine)]
        x, scale, shift = self.leaves
        scale, shift = (t.view(shape[0], -1, shape[2], 1, 1) for t in (scale, shift))
        before = F.group_norm(x.flatten(0, 1), groups).view(shape) * scale + shift
        self.truth = torch.where(before > 0, before, slope * before)
        certain = before.detach().abs() > 1e2 * torch.finfo(dtype).eps  # of the sign, which the gradient depends on
        self.grad = in_order((torch.randn(shape) * certain).to(dtype), order)

    def run(self) -> list[Tensor]:
        """The result and all gradients."""
        y, *_ = ops.sample_norm(self.x, *self.affine, num_groups=self.groups, negative_slope=self.slope)
        return [y, *torch.autograd.grad(y, [self.x, *self.affine], self.grad)]

    def check(self) -> None:
        assert ops.plan_sample_norm(self.x, *self.affine).algorithm == "native"
        expected = [self.truth, *torch.autograd.grad(self.truth, self.leaves, self.grad.double())]
        for got, wanted in zip(self.run(), expected, strict=True):
            assert_close(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_sample_norm_triton_equals_float64(shape, groups, order, dtype):
    Problem(shape, groups, order, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_sample_norm_triton_with_float32_coefficients_of_channels(order, dtype):
    for slope in (1.0, 0.0):
        Problem((2, 9, 4, 5, 4), 2, order, dtype, kind="channel", slope=slope, own=torch.float32).check()


@pytest.mark.parametrize("order", ORDERS)
def test_sample_norm_triton_merges_many_small_tiles(order, monkeypatch):
    from bsfast.triton import sample_norm, tensors

    monkeypatch.setattr(tensors, "TILE", 16)
    monkeypatch.setattr(tensors, "MERGED", 4)
    monkeypatch.setattr(sample_norm, "MOST_LANES", 2)
    for kind, groups in itertools.product(["channel", "sample"], [1, 3]):
        Problem((2, 3, 3, 5, 4), groups, order, torch.float32, kind=kind).check()


@pytest.mark.parametrize("order", ORDERS)
def test_sample_norm_triton_repeats_bit_for_bit(order):
    problem = Problem((2, 33, 4, 9, 8), 2, order, torch.bfloat16)
    for one, other in zip(problem.run(), problem.run(), strict=True):
        assert torch.equal(one, other)


def test_sample_norm_triton_refuses_other_dtypes_of_what_each_sample_has():
    x = in_order(torch.randn(2, 5, 3, 4, 4).half(), "batch_last")
    own, each = torch.ones(2, 3), torch.ones(2, 5, 3)
    assert ops.plan_sample_norm(x, own, own).algorithm == "native"
    assert ops.plan_sample_norm(x, each, each)[:2] == ("aten", "operands of different dtypes or devices")
    # As stock operators do: what is not of x's dtype is promoted.
    assert functional.adaptive_instance_norm(x, each, each).dtype == torch.float32


@pytest.mark.skipif(DEVICE == "cpu", reason="of CUDA's autocast")
def test_group_norm_under_autocast_is_of_float32_as_stock_is():
    x = in_order(torch.randn(2, 5, 4, 4, 4).half(), "batch_last")
    with torch.autocast("cuda"):
        y = functional.group_norm(x, 2, torch.ones(2, 4), torch.zeros(2, 4))
        assert y.dtype == F.group_norm(x[0], 2).dtype == torch.float32
