"""Triton's batch normalisation called directly, on a GPU or interpreted: values, precision, repeatability, errors."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast import ops
from bsfast.nn import functional
from bsfast.ops.backend import triton_why_not
from tests.cases import in_order

INTERPRETED = bool(os.environ.get("BSFAST_TRITON_INTERPRETED"))  # `make test-device` sets it
DEVICE = "cpu" if INTERPRETED else "cuda"
WHY_NOT = None if INTERPRETED else triton_why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no Triton kernels: {WHY_NOT}")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDERS = ["batch_last", "contiguous"]
SHAPES = [(2, 17, 3, 5, 4), (1, 33, 2, 9, 7), (3, 1, 2, 6, 5), (1, 5, 1, 3, 3), (2, 128, 2, 8, 8), (1, 3, 2, 1, 1)]
NAMES = ("mean", "variance", "scale", "shift", "inv")
# Relative L2 errors: sums are merged in float64; what is stored with 16 bits is rounded once, by the interpreter cut.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare with the bound of the dtype; NaN fails."""
    assert actual.shape == expected.shape
    error = torch.linalg.vector_norm(actual.double() - expected.double()).item()
    assert error <= BOUNDS[actual.dtype] * torch.linalg.vector_norm(expected.double()).item()


class Problem:
    """Operands, outputs full of NaN, and the truth in float64."""

    def __init__(self, shape, order, dtype, *, affine=True, residual=True, relu=True) -> None:
        self.own = torch.promote_types(dtype, torch.float32)
        self.order, self.dtype, self.relu = order, dtype, relu
        self.x = self.activation(3 * torch.randn(shape, dtype=torch.float64) + 5)
        self.residual = self.activation(torch.randn(shape, dtype=torch.float64)) if residual else None
        sizes = (shape[0], shape[2])
        self.affine = [torch.randn(sizes, dtype=self.own, device=DEVICE) if affine else None for _ in range(2)]
        self.out = {name: torch.full(sizes, torch.nan, dtype=self.own, device=DEVICE) for name in NAMES}
        self.leaves = [
            None if t is None else t.double().detach().requires_grad_() for t in (self.x, *self.affine, self.residual)
        ]
        x, *affine, other = self.leaves
        rows = zip(x, *([None] * len(x) if t is None else t for t in affine), strict=True)
        self.before = torch.stack([F.batch_norm(x_k, None, None, w_k, b_k, training=True) for x_k, w_k, b_k in rows])
        self.before = self.before if other is None else self.before + other
        self.truth = self.before.relu() if relu else self.before
        # Where the sign of the truth is not certain, the ReLU may decide otherwise: no gradient goes there.
        certain = self.before.detach().abs() > 1e2 * torch.finfo(dtype).eps
        self.grad = self.activation(torch.randn(shape, device=DEVICE) * certain)

    def activation(self, values: Tensor) -> Tensor:
        return in_order(values.to(self.dtype), self.order)

    def nan(self) -> Tensor:
        return in_order(torch.full(self.x.shape, torch.nan, dtype=self.dtype), self.order)

    def run(self, y: Tensor | None, *, known: bool = False) -> Tensor | None:
        given = (self.x, *self.affine, self.residual, y, *self.out.values(), 1e-5, self.relu, known)
        torch.ops.bsfast.batch_norm_out(*given)
        return y

    def gradients(self, y: Tensor | None, *, in_place: bool = False) -> list[Tensor]:
        """Of x, weight, bias and, if the ReLU follows a sum, the residual."""
        grad = self.grad.clone() if in_place else self.grad
        x_grad, residual_grad = grad if in_place else self.nan(), self.nan() if y is not None else None
        own = [torch.full_like(self.out["mean"], torch.nan) for _ in range(2)]
        statistics = [self.out[name] for name in ("mean", "scale", "shift", "inv")]
        torch.ops.bsfast.batch_norm_grad_out(self.x, y, grad, *statistics, x_grad, *own, residual_grad, self.relu)
        return [x_grad, *own, *([] if residual_grad is None else [residual_grad])]

    def expected_gradients(self) -> list[Tensor]:
        return torch.autograd.grad(self.truth, [t for t in self.leaves if t is not None], self.grad.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_triton_equals_float64(shape, order, dtype):
    problem = Problem(shape, order, dtype)
    y = problem.run(problem.nan())
    assert_close(y, problem.truth)
    for got, wanted in zip(problem.gradients(y), problem.expected_gradients(), strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_triton_without_residual_computes_the_mask_again(affine, relu):
    problem = Problem((2, 17, 3, 5, 4), "batch_last", torch.float32, affine=affine, residual=False, relu=relu)
    assert_close(problem.run(problem.nan()), problem.truth)
    expected = problem.expected_gradients()
    for in_place in (False, True):
        got = problem.gradients(None, in_place=in_place)
        for own, wanted in zip(got[: len(expected)], expected, strict=True):
            assert_close(own, wanted)


def test_batch_norm_triton_in_place_with_residual():
    problem = Problem((2, 17, 3, 5, 4), "batch_last", torch.bfloat16)
    y = problem.run(problem.nan())
    for one, other in zip(problem.gradients(y), problem.gradients(y, in_place=True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_triton_statistics_alone_and_given_ones(dtype):
    problem = Problem((2, 33, 3, 5, 4), "batch_last", dtype)
    assert problem.run(None) is None
    expected_variance, expected_mean = torch.var_mean(problem.x.double(), dim=(1, 3, 4), correction=0)
    torch.testing.assert_close(problem.out["mean"].double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(problem.out["variance"].double(), expected_variance, rtol=1e-6, atol=0)
    before = {name: t.clone() for name, t in problem.out.items()}
    for name in ("scale", "shift", "inv"):
        problem.out[name].fill_(torch.nan)
    assert_close(problem.run(problem.nan(), known=True), problem.truth)
    for name in ("mean", "variance"):
        assert torch.equal(problem.out[name], before[name])
    for name in ("scale", "shift", "inv"):
        torch.testing.assert_close(problem.out[name], before[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_batch_norm_triton_merges_many_small_tiles(order, monkeypatch):
    from bsfast.triton import tensors

    monkeypatch.setattr(tensors, "TILE", 16)
    monkeypatch.setattr(tensors, "MERGED", 4)
    problem = Problem((2, 7, 2, 6, 5), order, torch.float32)
    y = problem.run(problem.nan())
    assert_close(y, problem.truth)
    for got, wanted in zip(problem.gradients(y), problem.expected_gradients(), strict=True):
        assert_close(got, wanted)


def test_batch_norm_triton_of_a_large_mean_keeps_its_variance():
    problem = Problem((2, 64, 1, 16, 16), "batch_last", torch.float32, residual=False)
    problem.x.copy_(torch.randn(problem.x.shape, device=DEVICE) + 1e4)
    problem.run(None)
    expected = problem.x.double().var(dim=(1, 3, 4), correction=0)
    torch.testing.assert_close(problem.out["variance"].double(), expected, rtol=1e-6, atol=0)


def test_batch_norm_triton_repeats_bit_for_bit():
    problem = Problem((2, 65, 3, 9, 8), "batch_last", torch.bfloat16)
    first = problem.run(problem.nan())
    before = [first, *(t.clone() for t in problem.out.values()), *problem.gradients(first)]
    after = [problem.run(problem.nan()), *problem.out.values(), *problem.gradients(first)]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_batch_norm_triton_keeps_what_is_not_a_number():
    problem = Problem((1, 17, 2, 3, 3), "batch_last", torch.float32)
    problem.x[0, 3, 1, 0, 0] = torch.nan
    y = problem.run(problem.nan())
    assert y[:, :, 1].isnan().all()
    assert not y[:, :, 0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("own", ["float32", "same"])
def test_batch_norm_triton_layer_of_16_bit_activations(own, dtype):
    shape = (2, 17, 3, 5, 4)
    x = in_order(torch.randn(shape, device=DEVICE).to(dtype), "batch_last").requires_grad_()
    kind = torch.float32 if own == "float32" else dtype
    weight, bias = (torch.randn(2, 3, dtype=kind, device=DEVICE, requires_grad=True) for _ in range(2))
    running = [torch.zeros(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)]
    assert ops.plan_batch_norm(x, weight, bias).algorithm == "native"
    y = functional.batch_norm(x, *running, weight, bias, training=True, momentum=0.3)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected_running = [torch.zeros(2, 3, device=DEVICE).double(), torch.ones(2, 3, device=DEVICE).double()]
    expected = torch.stack([
        F.batch_norm(leaves[0][k], *(t[k] for t in expected_running), leaves[1][k], leaves[2][k], True, 0.3)
        for k in range(2)
    ])
    assert_close(y, expected)
    for got, wanted in zip(running, expected_running, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight, bias), grad)
    for got, wanted in zip(grads, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        assert_close(got, wanted)


def test_batch_norm_triton_refuses_statistics_of_16_bits():
    problem = Problem((2, 3, 4, 5, 6), "batch_last", torch.float16)
    problem.out["mean"] = problem.out["mean"].half()
    message = "batch_norm_out: every statistic and coefficient must be contiguous and have the activations' dtype, or "
    with pytest.raises(RuntimeError, match=message):
        problem.run(problem.nan())


if WHY_NOT is None:
    import triton
    import triton.language as tl

    from bsfast.triton.batch_norm_kernels import locate as locate_channel
    from bsfast.triton.sample_norm_kernels import locate as locate_sample

    @triton.jit(do_not_specialize=("repeats", "channels", "length"))
    def channel_offsets(out, repeats, channels, length):
        unit, at, _, _ = locate_channel(repeats, channels, length, 1, 1, 2, 4)
        tl.store(out + unit * 8 + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :], at)

    @triton.jit(do_not_specialize=("rows", "lanes"))
    def sample_offsets(out, rows, lanes):
        unit, _, _, at, _, _ = locate_sample(rows, lanes, 1, 1, False, 2, 4)
        tl.store(out + unit * 8 + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :], at)


def test_offsets_of_triton_kernels_have_64_bits():
    down, right = torch.arange(2, device=DEVICE)[:, None], torch.arange(4, device=DEVICE)
    out = torch.zeros(6, 2, 4, dtype=torch.int64, device=DEVICE)
    repeats, channels, length = 3, 2, 2**30
    channel_offsets[6,](out, repeats, channels, length)
    for unit in range(6):
        first = unit // channels * repeats * channels + unit % channels
        assert torch.equal(out[unit], (first + down * channels) * length + right)
    rows, lanes = 2**30, 5
    sample_offsets[6,](out, rows, lanes)
    for unit in range(6):
        assert torch.equal(out[unit], (unit * rows + down) * lanes + right)
