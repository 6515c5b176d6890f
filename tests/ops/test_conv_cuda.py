"""The CUDA convolution kernels called directly, on a GPU or emulated: values, alignment, repeatability, errors."""

import os
import re

import pytest
import torch
from torch import Tensor

from bsfast.ops.backend import native_why_not
from tests.cases import NATIVE_CONV, TRIPLE, ConvCase, in_order
from tests.tolerance import assert_close

EMULATED = os.environ.get("BSFAST_EMULATED_LIBRARY")  # `make test-device` sets it
DEVICE = "cpu" if EMULATED else "cuda"
WHY_NOT = None if EMULATED else native_why_not("cuda")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no CUDA kernels: {WHY_NOT}")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MATRIX = [  # of sizes that the matrix units take, too
    ConvCase(2, 64, 6, 12, (5, 6), padding=(1, 1), order="batch_last"),
    ConvCase(2, 56, 5, 17, (5, 4), (3, 3), (2, 2), (1, 1), order="batch_last"),
    ConvCase(2, 64, 3, 8, (4, 5), (1, 1), (2, 1), shared=True, order="batch_last"),
    ConvCase(1, 128, 4, 24, (4, 4), (3, 2), (1, 1), (2, 0), (1, 2), groups=2, order="batch_last"),
]
CASES = [(name, case) for case in [*NATIVE_CONV, *MATRIX] for name in case.own_kernels]


def placed(like: Tensor, order: str, offset: int) -> Tensor:
    """NaN shaped as ``like`` that starts ``offset`` elements into its allocation."""
    memory = torch.full((offset + like.numel(),), torch.nan, dtype=like.dtype, device=DEVICE)
    return memory.as_strided(like.shape, in_order(torch.empty(like.shape), order).stride(), offset)


def run(name: str, case: ConvCase, dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Run a kernel on operands at an offset; return its result and the truth."""
    *operands, truth = case.problem(name, dtype)
    orders = ("batch_last", "batch_last" if name == "conv2d_weight_grad" else "contiguous")
    a, b = (placed(t, order, offset).copy_(t) for t, order in zip(operands, orders, strict=True))
    out = placed(truth.to(dtype), "contiguous" if name == "conv2d_weight_grad" else "batch_last", offset)
    getattr(torch.ops.bsfast, f"{name}_out")(a, b, out, *case.geometry.values())
    return out.cpu(), truth.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_conv_cuda_equals_loop(name, case, dtype):
    out, truth = run(name, case, dtype)
    assert_close(out, truth, case.sum_length, dtype)


def wide(coefficients: Tensor) -> Tensor:
    return coefficients.double()[:, None, :, None, None]


def on_device(t: Tensor) -> Tensor:
    """A copy of an activation, batch-last, on the device of the kernels."""
    return placed(t, "batch_last", 0).copy_(t)


AROUND = [case for case in [*NATIVE_CONV, *MATRIX] if not case.shared]
PARTS = [{"scale", "shift", "rectify"}, {"out_scale", "bias", "residual", "relu"}, {"residual", "mask"}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AROUND, ids=str)
def test_conv_cuda_prologue_epilogue_and_statistics(case, dtype):
    x, weight, truth = case.problem("conv2d", dtype)
    scale, shift = torch.randn(2, *x.shape[:3:2])
    factor, bias = torch.randn(2, *truth.shape[:3:2])
    residual, mask = torch.randn(2, *truth.shape).to(dtype)
    read = (wide(scale) * x.double() + wide(shift)).relu()
    given = {"scale": scale.to(DEVICE), "shift": shift.to(DEVICE), "rectify": True, "relu": True}
    given |= {"out_scale": factor.to(DEVICE), "bias": bias.to(DEVICE)}
    given |= {"residual": on_device(residual), "mask": on_device(mask)}
    for names in (*PARTS, set().union(*PARTS)):
        chosen = {name: value for name, value in given.items() if name in names}
        out, moments = placed(truth.to(dtype), "batch_last", 0), torch.full((2, *bias.shape), torch.nan, device=DEVICE)
        operands = (on_device(x), weight.to(DEVICE), out, *case.geometry.values())
        torch.ops.bsfast.conv2d_out(*operands, **chosen, mean=moments[0], variance=moments[1])
        y = case.loop(read, weight.double()) if "scale" in names else truth
        y = wide(factor) * y + wide(bias) if "bias" in names else y
        y = y + residual.double() if "residual" in names else y
        y = y.relu() if "relu" in names else y
        y = torch.where(mask > 0, y, 0) if "mask" in names else y
        assert_close(out.cpu(), y.cpu(), case.sum_length, dtype)
        stored, (mean, variance) = out.cpu().double(), moments.cpu().double()
        torch.testing.assert_close(mean, stored.mean((1, 3, 4)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(variance, stored.var((1, 3, 4), correction=0), rtol=1e-4, atol=1e-6)

    grad, out = torch.randn(truth.shape).to(dtype), torch.full_like(weight, torch.nan, device=DEVICE)
    coefficients = {name: given[name] for name in ("scale", "shift", "rectify")}
    torch.ops.bsfast.conv2d_weight_grad_out(on_device(x), on_device(grad), out, *case.geometry.values(), **coefficients)
    expected = case.loop_grads(read, weight.double(), grad.double())[1]
    assert_close(out.cpu(), expected.cpu(), case.sum_length, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for name, case in CASES if name == "conv2d_input_grad"], ids=str)
def test_input_grad_cuda_adds_a_residual_and_applies_a_mask(case, dtype):
    grad, weight, truth = case.problem("conv2d_input_grad", dtype)
    residual, mask = torch.randn(2, *truth.shape).to(dtype)
    out = placed(truth.to(dtype), "batch_last", 0)
    operands = (on_device(grad), weight.to(DEVICE), out, *case.geometry.values())
    torch.ops.bsfast.conv2d_input_grad_out(*operands, residual=on_device(residual), mask=on_device(mask))
    expected = torch.where(mask > 0, truth + residual, 0)
    assert_close(out.cpu(), expected.cpu(), case.sum_length, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*NATIVE_CONV, MATRIX[1]], ids=str)
def test_sample_grad_cuda_equals_loop_over_samples(case, dtype):
    grads = torch.cat([case.grad(dtype), case.grad(dtype)], 1)
    x, expected = case.x(dtype), []
    for n in range(grads.shape[1]):
        sample = x.narrow(-4, n % case.samples, 1).double()
        weight = torch.zeros(case.weight_shape, dtype=torch.float64)
        expected.append(case.loop_grads(sample, weight, grads[:, n : n + 1].double())[1])
    truth = torch.stack(expected, -1)
    out = placed(truth.to(dtype), "contiguous", 0)
    operands = (on_device(x), on_device(grads), out, *case.geometry.values())
    torch.ops.bsfast.conv2d_weight_grad_per_sample_out(*operands)
    assert_close(out.cpu(), truth.cpu(), case.size[0] * case.size[1], dtype)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRIPLE)
def test_conv_cuda_at_any_alignment(name, dtype, offset):
    out, truth = run(name, MATRIX[0], dtype, offset)
    assert_close(out, truth, MATRIX[0].sum_length, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRIPLE)
def test_conv_cuda_twice_gives_the_same_bits(name, dtype):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(run(name, MATRIX[1], dtype)[0])
    assert torch.equal(*results)


def operands() -> dict[str, Tensor]:
    x, y = (in_order(torch.zeros(shape), "batch_last") for shape in ((2, 3, 4, 6, 5), (2, 3, 8, 4, 3)))
    return {"x": x.to(DEVICE), "weight": torch.zeros(2, 8, 4, 3, 3, device=DEVICE), "out": y.to(DEVICE)}


SETTINGS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
TOGETHER = "must be given together"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"out": t["out"][:, :, :7]}, "out must have shape (2, 3, 8, 4, 3), got (2, 3, 7, 4, 3)"),
        (lambda t: {"weight": t["weight"].half()}, "all tensors must have one dtype"),
        (lambda t: {k: v.double() for k, v in t.items()}, "dtype must be float32, float16 or bfloat16 on CUDA"),
        (lambda t: {"x": t["x"].contiguous()}, "x must be batch-last in memory"),
        (lambda t: {"weight": t["weight"].mT}, "weight must be contiguous"),
        (lambda t: {"winograd": 2}, "winograd must be left out on CUDA"),
        (lambda t: {"scale": torch.zeros(2, 4, device=DEVICE)}, f"scale and shift {TOGETHER}"),
        (lambda t: {"mean": torch.zeros(2, 8, device=DEVICE)}, f"mean and variance {TOGETHER}"),
        (lambda t: {"bias": torch.zeros(2, 7, device=DEVICE)}, "mean and variance must have shape (2, 8), got (2, 7)"),
        (lambda t: {"out_scale": torch.zeros(8, 2, device=DEVICE).t()}, "mean and variance must be contiguous"),
        (
            lambda t: {k: v.half() for k, v in t.items()} | {"bias": torch.zeros(2, 8, device=DEVICE).half()},
            "must be contiguous and have the activations' dtype, or float32 where that has 16 bits",
        ),
        (lambda t: {"residual": t["out"][..., 1:]}, "residual must have shape (2, 3, 8, 4, 3), got (2, 3, 8, 4, 2)"),
        (lambda t: {"mask": t["out"].contiguous()}, "mask must be batch-last in memory"),
        (lambda t: {"mask": t["out"].half()}, "all tensors must have one dtype"),
    ],
)
def test_conv_cuda_errors(change, message):
    given = operands()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.bsfast.conv2d_out(**{**given, **SETTINGS, **change(given)})


@pytest.mark.skipif(EMULATED is not None, reason="the emulation has one device")
def test_conv_cuda_refuses_other_devices():
    given = operands()
    elsewhere = {
        "weight": given["weight"].cpu(),
        "bias": torch.zeros(2, 8, device="cpu"),
        "residual": given["out"].cpu(),
    }
    for name, t in elsewhere.items():
        with pytest.raises(RuntimeError, match="all tensors must be on one device"):
            torch.ops.bsfast.conv2d_out(**{**given, **SETTINGS, name: t})


@pytest.mark.skipif(EMULATED is not None, reason="the emulation has no streams")
def test_conv_cuda_runs_in_a_graph_on_its_stream():
    case = MATRIX[0]
    x, weight, _ = case.problem("conv2d", torch.float32)
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    out, truth = placed(case.grad(torch.float32), "batch_last", 0), case.loop(x.cpu().double(), weight.cpu().double())
    torch.ops.bsfast.conv2d_out(x, weight, out, *case.geometry.values())  # CUDA loads a kernel at its first launch
    out.fill_(torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.bsfast.conv2d_out(x, weight, out, *case.geometry.values())
    assert out.isnan().all()  # capturing runs nothing
    graph.replay()
    assert_close(out.cpu(), truth, case.sum_length)
