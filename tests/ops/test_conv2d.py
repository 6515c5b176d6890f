"""The convolution triple against a loop over stock convolutions: values, dtypes, memory order, fakes, repeatability."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from bsfast.ops import conv2d, conv2d_input_grad, conv2d_weight_grad, plan
from bsfast.ops.backend import native_why_not
from tests.cases import CONV, FEW_CONV, NATIVE_CONV, TRIPLE, ConvCase, in_order
from tests.tolerance import assert_close

DEVICE = torch.get_default_device().type
DTYPES = [torch.float64, torch.float32]


def problem(
    case: ConvCase, name: str, dtype: torch.dtype
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor], Tensor]:
    """The function under test, its two operands, and the true result in float64."""
    functions = {
        "conv2d": lambda a, b: conv2d(a, b, **case.geometry),
        "conv2d_input_grad": lambda a, b: conv2d_input_grad(a, b, case.x_shape, **case.geometry),
        "conv2d_weight_grad": lambda a, b: conv2d_weight_grad(a, b, case.kernel, **case.geometry),
    }
    a, b, expected = case.problem(name, dtype)
    return functions[name], (a, b), expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV, ids=str)
@pytest.mark.parametrize("name", TRIPLE)
def test_conv2d_equals_loop(name, case, dtype):
    function, operands, expected = problem(case, name, dtype)
    assert_close(function(*operands), expected, case.sum_length, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TRIPLE)
@pytest.mark.parametrize("case", FEW_CONV, ids=str)
def test_conv2d_half_precision(case, name, dtype):
    function, operands, expected = problem(case, name, dtype)
    assert_close(function(*operands), expected, case.sum_length, dtype)


@pytest.mark.parametrize("case", CONV, ids=str)
def test_conv2d_memory_order(case):
    # Batch-last in, batch-last out, else contiguous; the first operand decides. An empty tensor counts as contiguous.
    x, weight, grad = case.x(), case.weight(), case.grad()
    y, x_grad = conv2d(x, weight, **case.geometry), conv2d_input_grad(grad, weight, case.x_shape, **case.geometry)
    for result, first in ((y, x), (x_grad, grad)):
        batch_last = case.order == "batch_last" and not first.is_contiguous()
        expected = in_order(torch.empty(result.shape), "batch_last" if batch_last else "contiguous")
        assert strides(result) == strides(expected)
    assert conv2d_weight_grad(x, grad, case.kernel, **case.geometry).is_contiguous()


def raw_calls(case: ConvCase, dtype: torch.dtype = torch.float64) -> Iterator[tuple[object, tuple[object, ...]]]:
    x, weight, grad = case.x(dtype), case.weight(dtype), case.grad(dtype)
    geometry = tuple(case.geometry.values())
    yield torch.ops.bsfast.conv2d.default, (x, weight, *geometry)
    yield torch.ops.bsfast.conv2d_input_grad.default, (grad, weight, case.x_shape, *geometry)
    yield torch.ops.bsfast.conv2d_weight_grad.default, (x, grad, case.kernel, *geometry)


@pytest.mark.parametrize("case", CONV, ids=str)
def test_conv2d_result_can_be_changed_in_place(case):
    x, weight, grad = case.x().requires_grad_(), case.weight().requires_grad_(), case.grad()
    y = conv2d(x, weight, **case.geometry)
    assert y.relu_() is y
    expected = torch.autograd.grad(case.loop(x, weight).relu(), (x, weight), grad)
    for actual, wanted in zip(torch.autograd.grad(y, (x, weight), grad), expected, strict=True):
        assert_close(actual, wanted, case.sum_length)


def strides(t: Tensor) -> list[int]:
    """Strides that mean something: an axis of length 1 and an empty tensor have none."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


@pytest.mark.parametrize("case", CONV, ids=str)
def test_conv2d_fake_equals_real(case):
    for op, arguments in raw_calls(case):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        real = op(*arguments)
        meta = op(*(a.to("meta") if isinstance(a, Tensor) and case.order != "expanded" else a for a in arguments))
        assert (meta.shape, strides(meta), meta.dtype) == (real.shape, strides(real), real.dtype)


@pytest.mark.parametrize("case", FEW_CONV, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=TRIPLE)
def test_conv2d_opcheck(case, which):
    op, arguments = list(raw_calls(case))[which]
    tracked = [a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(op, tuple(tracked))


@pytest.mark.skipif(native_why_not(DEVICE) is not None, reason="no own kernels here")
@pytest.mark.parametrize("case", NATIVE_CONV, ids=str)
def test_conv2d_runs_on_own_kernels(case):
    for name in TRIPLE:
        function, operands, _ = problem(case, name, torch.float32)
        with plan.noting() as notes:
            function(*operands)
        assert [note.algorithm for note in notes] == ["native" if name in case.own_kernels else "grouped"]


@pytest.mark.parametrize("orders", [("batch_last", "contiguous"), ("contiguous", "batch_last"), ("strided",) * 2])
@pytest.mark.parametrize("case", FEW_CONV, ids=str)
def test_conv2d_weight_grad_takes_two_orders(case, orders):
    x, grad, expected = case.problem("conv2d_weight_grad", torch.float64)
    x, grad = (in_order(t.contiguous(), order) for t, order in zip((x, grad), orders, strict=True))
    assert_close(conv2d_weight_grad(x, grad, case.kernel, **case.geometry), expected, case.sum_length)


@pytest.mark.parametrize("case", FEW_CONV, ids=str)
def test_conv2d_autocast(case):
    x, weight = case.x(torch.float32).requires_grad_(), case.weight(torch.float32).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = conv2d(x, weight, **case.geometry)
        assert conv2d(x.double(), weight.double(), **case.geometry).dtype == torch.float64  # as stock autocast
    assert_close(y, case.loop(x.double(), weight.double()), case.sum_length, torch.bfloat16)
    grad = torch.randn_like(y)
    expected = case.loop_grads(x.double(), weight.double(), grad.double())
    for actual, wanted in zip(torch.autograd.grad(y, (x, weight), grad), expected, strict=True):
        assert_close(actual.bfloat16(), wanted, case.sum_length)
        assert actual.dtype == torch.float32


@pytest.mark.parametrize("case", FEW_CONV, ids=str)
def test_conv2d_autocast_leaves_gradients_alone(case):
    # Only the convolution is on autocast's list; its derivatives run in the dtype they are given.
    x, weight, grad = case.x(torch.float32), case.weight(torch.float32), case.grad(torch.float32)
    expected = case.loop_grads(x.double(), weight.double(), grad.double())
    with torch.autocast(DEVICE, torch.bfloat16):
        x_grad = conv2d_input_grad(grad.requires_grad_(), weight, case.x_shape, **case.geometry)
        (grad_grad,) = torch.autograd.grad(x_grad, grad, x)  # a convolution of x
        weight_grad = conv2d_weight_grad(x, grad, case.kernel, **case.geometry)
        raw = torch.ops.bsfast.conv2d(x, weight, *case.geometry.values())
    for y in (grad_grad, raw):
        assert_close(y, case.loop(x.double(), weight.double()), case.sum_length, torch.float32)
    assert_close(x_grad, expected[0], case.sum_length, torch.float32)
    assert_close(weight_grad, expected[1], case.sum_length, torch.float32)


@pytest.mark.parametrize(("order", "requires"), product(["contiguous", "batch_last"], [(True, False), (False, True)]))
def test_conv2d_computes_only_the_gradients_asked_for(order, requires):
    case = ConvCase(2, 3, 2, 3, (4, 3), padding=(1, 1), order=order)
    x, weight = case.x().requires_grad_(requires[0]), case.weight().requires_grad_(requires[1])
    y = conv2d(x, weight, **case.geometry)
    with plan.noting() as notes:
        y.sum().backward()
    assert len(notes) == 1
    assert (x.grad is not None, weight.grad is not None) == requires


def test_conv2d_inference_mode():
    case = FEW_CONV[0]
    with torch.inference_mode():
        x, weight = case.x(), case.weight()
        assert_close(conv2d(x, weight, **case.geometry), case.loop(x, weight), case.sum_length)
