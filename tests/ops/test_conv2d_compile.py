"""torch.compile of the convolution triple: one graph, forward and backward, fixed and dynamic sizes."""

import pytest
import torch
from torch.func import jvp

from bsfast.layout import is_batch_last
from bsfast.ops import conv2d, conv2d_input_grad, conv2d_weight_grad
from tests.cases import FEW_CONV, ConvCase
from tests.tolerance import assert_close

DEVICE = torch.get_default_device().type
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", FEW_CONV[:3], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv2d_compiles_with_its_backward(backend, case, dynamic):
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return conv2d(x.sin(), weight, **case.geometry).relu()

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for samples in (case.samples, case.samples + 2):
        bigger = ConvCase(**(vars(case) | {"samples": samples}))
        x, weight, grad = bigger.x().requires_grad_(), bigger.weight().requires_grad_(), bigger.grad()
        y = compiled(x, weight)
        assert is_batch_last(y) == (case.order == "batch_last")
        truth = bigger.loop(x.sin(), weight).relu()
        assert_close(y, truth, case.sum_length)
        expected = torch.autograd.grad(truth, (x, weight), grad)
        for actual, wanted in zip(torch.autograd.grad(y, (x, weight), grad), expected, strict=True):
            assert_close(actual, wanted, case.sum_length)


@pytest.mark.parametrize("case", FEW_CONV[1:3], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv2d_gradients_compile(backend, case):
    def both(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_grad = conv2d_input_grad(grad, weight, tuple(x.shape), **case.geometry)
        return x_grad, conv2d_weight_grad(x, grad, case.kernel, **case.geometry)

    x, weight, grad = case.x(), case.weight(), case.grad()
    results = torch.compile(both, backend=backend, fullgraph=True)(x, weight, grad)
    for actual, wanted in zip(results, case.loop_grads(x, weight, grad), strict=True):
        assert_close(actual, wanted, case.sum_length)


@pytest.mark.parametrize("case", FEW_CONV[:2], ids=str)
def test_conv2d_compiles_under_transforms(case):
    x, weight = case.x(), case.weight()

    def both(function):
        def gradient_and_tangent(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gradient = torch.func.grad(lambda weight: function(x, weight).pow(3).sum())
            return jvp(gradient, (weight,), (weight.sin(),))

        return gradient_and_tangent

    compiled = torch.compile(both(lambda x, w: conv2d(x, w, **case.geometry)), backend="aot_eager", fullgraph=True)
    for actual, wanted in zip(compiled(x, weight), both(case.loop)(x, weight), strict=True):
        assert_close(actual, wanted, case.sum_length)


@pytest.mark.slow
def test_conv2d_compiles_under_autocast():
    case = FEW_CONV[0]
    x, weight = case.x(torch.float32), case.weight(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = torch.compile(lambda x, w: conv2d(x, w, **case.geometry), fullgraph=True)(x, weight)
    assert_close(y, case.loop(x.double(), weight.double()), case.sum_length, torch.bfloat16)
