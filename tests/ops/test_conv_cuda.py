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
LEFT_OUT = "must be left out on CUDA; the operators around a convolution do it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"out": t["out"][:, :, :7]}, "out must have shape (2, 3, 8, 4, 3), got (2, 3, 7, 4, 3)"),
        (lambda t: {"weight": t["weight"].half()}, "all tensors must have one dtype"),
        (lambda t: {k: v.double() for k, v in t.items()}, "dtype must be float32, float16 or bfloat16 on CUDA"),
        (lambda t: {"x": t["x"].contiguous()}, "x must be batch-last in memory"),
        (lambda t: {"weight": t["weight"].mT}, "weight must be contiguous"),
        (lambda t: {"winograd": 2}, f"winograd {LEFT_OUT}"),
        (lambda t: {"scale": t["x"][:, 0, :, 0, 0]}, f"scale, shift and rectify {LEFT_OUT}"),
        (lambda t: {"relu": True}, f"out_scale, bias, residual, relu and mask {LEFT_OUT}"),
        (lambda t: {"mean": t["out"][:, 0, :, 0, 0]}, f"mean and variance {LEFT_OUT}"),
    ],
)
def test_conv_cuda_errors(change, message):
    given = operands()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.bsfast.conv2d_out(**{**given, **SETTINGS, **change(given)})


@pytest.mark.skipif(EMULATED is not None, reason="the emulation has one device")
def test_conv_cuda_refuses_other_devices():
    given = operands()
    given["weight"] = given["weight"].cpu()
    with pytest.raises(RuntimeError, match="all tensors must be on one device"):
        torch.ops.bsfast.conv2d_out(**given, **SETTINGS)


@pytest.mark.skipif(EMULATED is not None, reason="the emulation has no streams")
def test_conv_cuda_runs_in_a_graph_on_its_stream():
    case = MATRIX[0]
    x, weight, _ = case.problem("conv2d", torch.float32)
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    out, truth = placed(case.grad(torch.float32), "batch_last", 0), case.loop(x.cpu().double(), weight.cpu().double())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.bsfast.conv2d_out(x, weight, out, *case.geometry.values())
    assert out.isnan().all()  # capturing runs nothing
    graph.replay()
    assert_close(out.cpu(), truth, case.sum_length)
