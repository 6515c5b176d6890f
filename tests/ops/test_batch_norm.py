"""Batch normalisation fused with a residual and a ReLU: against stock operators, and where it must not run."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast import ops
from bsfast.ops.backend import native_why_not
from tests.cases import in_order
from tests.ops.test_conv_kernels import in_another_process
from tests.tolerance import assert_close

WHY_NOT = native_why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")
SHAPES = [(2, 17, 3, 5, 4), (3, 33, 2, 9, 7), (1, 5, 1, 3, 3), (2, 128, 8, 16, 4), (2, 1, 3, 6, 5), (1, 3, 2, 1, 1)]
ORDERS = ["batch_last", "contiguous"]
KINDS = list(itertools.product([False, True], repeat=2))


def loop(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """The truth: one stock batch normalisation a branch."""
    rows = zip(x, *([None] * len(x) if t is None else t for t in (weight, bias)), strict=True)
    y = torch.stack([F.batch_norm(x_k, None, None, w_k, b_k, training=True) for x_k, w_k, b_k in rows])
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def operands(shape, order, dtype, *, affine=True, residual=False):
    x = in_order((3 * torch.randn(shape, dtype=torch.float64) + 5).to(dtype), order)
    weight, bias = (torch.randn(shape[0], shape[2], dtype=dtype) if affine else None for _ in range(2))
    other = in_order(torch.randn(shape, dtype=torch.float64).to(dtype), order) if residual else None
    return [x, weight, bias, other]


def leaves(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def run(tensors, relu):
    y, _mean, _variance = ops.batch_norm(*tensors[:3], residual=tensors[3], relu=relu)
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_and_gradients_are_those_of_the_loop(shape, order, dtype):
    length = shape[1] * shape[3] * shape[4]
    for residual, relu in KINDS:
        own = leaves(operands(shape, order, dtype, residual=residual))
        truth = leaves([None if t is None else t.double() for t in own])
        y, expected = run(own, relu), loop(*truth, relu)
        assert y.stride() == own[0].stride()
        assert_close(y, expected, 64 * length)
        # Where float32 cannot tell the sign of the truth, the ReLU may decide otherwise: no gradient goes there.
        grad = torch.randn(y.shape, dtype=dtype) * (expected.detach().abs() > 1e-4)
        grads = torch.autograd.grad(y, [t for t in own if t is not None], grad)
        expected_grads = torch.autograd.grad(expected, [t for t in truth if t is not None], grad.double())
        for got, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(
                got.double(),
                wanted,
                rtol=1e-4 if dtype == torch.float32 else 1e-10,
                atol=3e-5 if dtype == torch.float32 else 1e-9,
            )


@pytest.mark.parametrize("order", ORDERS)
def test_batch_norm_returns_the_statistics(order):
    x, *_ = operands((3, 40, 2, 9, 8), order, torch.float32)
    _, mean, variance = ops.batch_norm(x, None, None)
    expected_variance, expected_mean = torch.var_mean(x.double(), dim=(1, 3, 4), correction=0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=1e-6, atol=0)


def test_batch_norm_of_a_large_mean_keeps_its_variance():
    x = in_order(torch.randn(2, 64, 1, 32, 32) + 1e4, "batch_last")
    _, _, variance = ops.batch_norm(x, None, None)
    torch.testing.assert_close(variance.double(), x.double().var(dim=(1, 3, 4), correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("residual", "relu"), KINDS)
def test_batch_norm_gradcheck(residual, relu):
    tensors = [t for t in operands((2, 3, 2, 2, 3), "batch_last", torch.float64, residual=residual) if t is not None]
    inputs = tuple(t.requires_grad_() for t in tensors)

    def call(*own):
        return run([*own, *[None] * (4 - len(own))], relu)

    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_gives_the_gradients_that_are_needed(needed, relu):
    tensors = operands((2, 17, 3, 4, 4), "batch_last", torch.float64, residual=True)
    expected = torch.autograd.grad(loop(*(own := leaves(tensors)), relu).sum(), [own[i] for i in needed])
    own = [t.requires_grad_(i in needed) for i, t in enumerate(leaves(tensors))]
    for create_graph in (False, True):
        grads = torch.autograd.grad(run(own, relu).sum(), [own[i] for i in needed], create_graph=create_graph)
        for got, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_plan_batch_norm_reasons():
    x, weight, *_ = operands((2, 17, 3, 4, 4), "batch_last", torch.float32)
    native = "batch-last: a channel is normalised while it is in cache"
    assert ops.plan_batch_norm(x, weight, None)[:2] == ("native", native)
    assert ops.plan_batch_norm(x.contiguous()).reason.startswith("contiguous: a channel")
    assert ops.plan_batch_norm(x.half(), weight.half())[:2] == ("aten", "torch.float16 has no own kernel")
    assert ops.plan_batch_norm(x, weight.double())[:2] == ("aten", "operands of different dtypes or devices")
    assert ops.plan_batch_norm(x, x.contiguous()).reason.startswith("this shape, or operands of different memory")
    assert ops.plan_batch_norm(x[..., ::2]).reason.startswith("neither memory order has no own kernel")
    assert ops.plan_batch_norm(x[:, :0]).algorithm == "aten"
    assert ops.plan_batch_norm(x[0]).algorithm == "aten"
    with torch.autograd.forward_ad.dual_level():
        assert ops.plan_batch_norm(x).algorithm == "aten"
    seen = []
    torch.func.grad(lambda t: (seen.append(ops.plan_batch_norm(t)), t.sum())[1])(x)
    assert seen[0].algorithm == "aten"


GOOD = {"x": (2, 3, 4, 5, 6), "stat": (2, 4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x must have shape (M, N, C, H, W), got (2, 3)"),
        ({"y": torch.zeros(2, 3, 4, 5, 7)}, "every activation must have shape (2, 3, 4, 5, 6), got (2, 3, 4, 5, 7)"),
        ({"y": torch.zeros(2, 3, 4, 5, 6).double()}, "all tensors must have one dtype"),
        ({"x": torch.zeros(2, 3, 4, 6, 5).mT}, "every activation must be batch-last in memory, got strides"),
        ({"mean": torch.zeros(2, 5)}, "every statistic and coefficient must have shape (2, 4), got (2, 5)"),
        (
            {"weight": torch.zeros(4, 2).T},
            "every statistic and coefficient must be contiguous and have the activations' dtype",
        ),
        ({"bias": torch.zeros(2, 4).double()}, "every statistic and coefficient must be contiguous and have"),
        ({"residual": torch.zeros(3)}, "every activation must have shape (2, 3, 4, 5, 6), got (3)"),
    ],
)
def test_batch_norm_out_guards_memory(change, message):
    given = {name: torch.zeros(GOOD["x"]) for name in ("x", "y", "residual")}
    statistics = ("mean", "variance", "scale", "shift", "inv")
    given |= {name: torch.zeros(GOOD["stat"]) for name in ("weight", "bias", *statistics)}
    given |= change
    order = ("x", "weight", "bias", "residual", "y", *statistics)
    with pytest.raises(RuntimeError) as error:
        torch.ops.bsfast.batch_norm_out(*(given[name] for name in order), 1e-5, False, False)
    assert f"batch_norm_out: {message}" in str(error.value)


BITS = """
import torch
from bsfast import ops
from tests.cases import in_order
torch.manual_seed(0)
x = in_order(torch.randn(3, 33, 5, 9, 7), "batch_last").requires_grad_()
sums = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    y, *_ = ops.batch_norm(x, None, None, relu=True)
    (grad,) = torch.autograd.grad((y * y).sum(), x)
    sums.append((y.double().sum().item(), grad.double().abs().sum().item()))
assert len(set(sums)) == 1, sums
expected = torch.stack([torch.nn.functional.batch_norm(k, None, None, training=True).relu() for k in x])
torch.testing.assert_close(y, expected)
"""


def test_batch_norm_on_every_instruction_set():
    from bsfast import _native

    sets = ["baseline", "avx2", "avx512"]
    for name in sets[: sets.index(_native.instruction_set()) + 1]:
        done = in_another_process(BITS, BSFAST_ISA=name)
        assert done.returncode == 0, done.stderr
