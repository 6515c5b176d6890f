"""The own convolution kernels called directly: values, alignment, stores past the caches, instruction sets, memory."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from bsfast.ops.backend import native_why_not
from tests.cases import NATIVE_CONV, TRIPLE, ConvCase, conv_cases, in_order
from tests.tolerance import assert_close

WHY_NOT = native_why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")
DTYPES = [torch.float64, torch.float32]
BOTH_ORDERS = NATIVE_CONV + [replace(case, order="contiguous") for case in NATIVE_CONV]
MARGIN = 7


def kernels(case: ConvCase) -> list[tuple[str, dict[str, bool]]]:
    """Name the own kernels of a case, each with its settings."""
    plain = [(name, {}) for name in case.own_kernels]
    has_patches = "conv2d_weight_grad" in case.own_kernels and case.dilation[1] == 1
    return plain + [("conv2d_weight_grad", {"patches": True})] * has_patches


KERNEL_CASES = [(*kernel, case) for case in BOTH_ORDERS for kernel in kernels(case)]


def placed(like: Tensor, order: str, offset: int, margin: float = torch.nan) -> tuple[Tensor, Tensor]:
    """NaN shaped as ``like`` that starts ``offset`` elements into its allocation, and that whole allocation."""
    memory = torch.full((offset + like.numel() + MARGIN,), margin, dtype=like.dtype)
    memory[offset : offset + like.numel()] = torch.nan
    return memory.as_strided(like.shape, in_order(torch.empty(like.shape), order).stride(), offset), memory


def run(name: str, case: ConvCase, a: Tensor, b: Tensor, out: Tensor, **settings: bool) -> None:
    getattr(torch.ops.bsfast, f"{name}_out")(a, b, out, *case.geometry.values(), **settings)


def check_placed(name: str, case: ConvCase, dtype: torch.dtype, offset: int, **settings: bool) -> Tensor:
    """Run a kernel on operands at an offset, compare it with the truth, and return the result."""
    *operands, truth = case.problem(name, dtype)
    orders = {"conv2d": (case.order, "contiguous"), "conv2d_input_grad": (case.order, "contiguous")}
    a, b = (
        placed(operand, order, offset)[0].copy_(operand)
        for operand, order in zip(operands, orders.get(name, (case.order, case.order)), strict=True)
    )
    result = truth.to(dtype)
    order = "contiguous" if name == "conv2d_weight_grad" else case.order
    out, memory = placed(result, order, offset + 16, margin=7)
    run(name, case, a, b, out, **settings)
    assert_close(out, truth, case.sum_length)
    assert set(memory[: offset + 16].tolist() + memory[-MARGIN:].tolist()) == {7}
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "settings", "case"), KERNEL_CASES, ids=str)
def test_conv_kernels_at_any_alignment(name, settings, case, dtype):
    for offset in (0, 1, 3):
        check_placed(name, case, dtype, offset, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=conv_cases())
def test_conv_kernels_random_shapes(case, dtype):
    for name, settings in kernels(case):
        check_placed(name, case, dtype, offset=0, **settings)


# Rows of so many channels and columns that only some samples at a time fit the scratch of a worker.
CHUNKED = [
    ConvCase(1, 67, 40, 5, (3, 70), padding=(1, 1), order="batch_last"),
    ConvCase(2, 32, 60, 3, (5, 65), (3, 2), (2, 3), (1, 1), (1, 2), order="batch_last"),
    ConvCase(2, 33, 3, 60, (4, 65), (3, 3), (1, 2), (1, 1), order="batch_last"),  # in the gradient of the input
    ConvCase(1, 35, 2, 50, (3, 40), padding=(1, 1), shared=True, order="batch_last"),  # and summed over branches
    ConvCase(1, 21, 72, 2, (6, 201), padding=(2, 1), order="batch_last"),  # one vector of samples is too much
    ConvCase(2, 3, 150, 2, (3, 203), (5, 1), padding=(2, 0), order="batch_last"),  # and so is less than one
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_conv_kernels_chunks_of_samples(case, dtype):
    for name, settings in kernels(case):
        check_placed(name, case, dtype, offset=0, **settings)


LARGE = {
    "conv2d": ConvCase(2, 64, 1, 36, (32, 31), padding=(1, 1), order="batch_last"),
    "conv2d, chunked": ConvCase(2, 64, 60, 37, (16, 60), (3, 1), padding=(1, 0), order="batch_last"),
    "conv2d_input_grad": ConvCase(2, 64, 36, 1, (32, 31), padding=(1, 1), order="batch_last"),
    "conv2d_input_grad, strided": ConvCase(2, 64, 36, 2, (32, 31), stride=(2, 2), padding=(1, 1), order="batch_last"),
}


@pytest.mark.parametrize(("samples", "offset"), [(64, 0), (64, 1), (65, 0)], ids=["aligned", "offset", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_conv_kernels_large_results(name, dtype, samples, offset):
    # Above 16 MiB full vectors are stored past the caches, if every one of them is aligned.
    torch.set_num_threads(2)
    case = replace(LARGE[name], samples=samples if dtype == torch.float32 else samples - 32)
    assert check_placed(name.split(",")[0], case, dtype, offset).nbytes > 16 * 2**20


@pytest.mark.parametrize(("name", "settings", "case"), KERNEL_CASES, ids=str)
def test_conv_kernels_do_not_depend_on_threads(name, settings, case):
    a, b, truth = case.problem(name, torch.float32)
    order = "contiguous" if name == "conv2d_weight_grad" else case.order
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(in_order(torch.full(truth.shape, torch.nan), order))
        run(name, case, a, b, results[-1], **settings)
    assert all(torch.equal(results[0], result) for result in results[1:])


X, WEIGHT = in_order(torch.zeros(2, 3, 4, 6, 5), "batch_last"), torch.zeros(2, 8, 4, 3, 3)
Y = in_order(torch.zeros(2, 3, 8, 4, 3), "batch_last")
OPERANDS = {
    "conv2d": {"x": X, "weight": WEIGHT, "out": Y},
    "conv2d_input_grad": {"grad": Y, "weight": WEIGHT, "out": X},
    "conv2d_weight_grad": {"x": X, "grad": Y, "out": WEIGHT},
}
SETTINGS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
AT_LEAST = "stride and dilation must be at least 1 and padding at least 0, got"
BAD_SETTINGS = [
    ({"stride": (1, 0)}, f"{AT_LEAST} (1, 0), (1, 1) and (0, 0)"),
    ({"padding": (-1, 0)}, f"{AT_LEAST} (1, 1), (1, 1) and (-1, 0)"),
    ({"dilation": (0, 1)}, f"{AT_LEAST} (1, 1), (0, 1) and (0, 0)"),
    ({"stride": (1, 1, 1)}, "stride, padding and dilation must be pairs, got (1, 1, 1)"),
    ({"padding": ()}, "stride, padding and dilation must be pairs, got ()"),
    ({"groups": 0}, "groups must divide the 8 output channels, got 0"),
    ({"groups": 3}, "groups must divide the 8 output channels, got 3"),
    ({"groups": 2}, "x must match weight (2, 8, 4, 3, 3) in branches and channels, got (2, 3, 4, 6, 5)"),
]
STRIDES = "must be batch-last in memory, got strides (360, 120, 30, 5, 1) for shape (2, 3, 4, 6, 5)"
NO_STRIDES = "must be batch-last in memory, got strides (0, 0, 0, 0, 0) for shape (2, 3, 8, 4, 3)"
CONTIGUOUS = "must be contiguous with shape (M, C_out, C_in / groups, kH, kW), got"
HALF = {name: {key: t.half() for key, t in tensors.items()} for name, tensors in OPERANDS.items()}
ONE_VALUE = torch.zeros(()).expand(Y.shape)
BAD_TENSORS = [
    ("conv2d", {"x": X.contiguous()}, f"x {STRIDES}"),
    ("conv2d", {"out": ONE_VALUE}, f"out {NO_STRIDES}"),
    ("conv2d", {"x": X.contiguous(), "out": ONE_VALUE}, f"x {STRIDES}"),
    ("conv2d_input_grad", {"grad": ONE_VALUE}, f"grad {NO_STRIDES}"),
    ("conv2d_input_grad", {"out": X.contiguous()}, f"out {STRIDES}"),
    ("conv2d_weight_grad", {"x": X.contiguous()}, f"x {STRIDES}"),
    ("conv2d_weight_grad", {"grad": ONE_VALUE}, f"grad {NO_STRIDES}"),
    ("conv2d", {"x": X[0, 0]}, "x must have 4 or 5 axes, got 3"),
    ("conv2d_input_grad", {"out": X[None]}, "x must have 4 or 5 axes, got 6"),
    ("conv2d_weight_grad", {"x": X[0, 0]}, "x must have 4 or 5 axes, got 3"),
    ("conv2d", {"weight": WEIGHT.transpose(-1, -2)}, f"weight {CONTIGUOUS} (2, 8, 4, 3, 3)"),
    ("conv2d", {"weight": WEIGHT[0]}, f"weight {CONTIGUOUS} (8, 4, 3, 3)"),
    ("conv2d_input_grad", {"weight": WEIGHT[..., :2]}, f"weight {CONTIGUOUS} (2, 8, 4, 3, 2)"),
    ("conv2d_weight_grad", {"out": WEIGHT.transpose(0, 1)}, f"out {CONTIGUOUS} (8, 2, 4, 3, 3)"),
    ("conv2d_weight_grad", {"out": WEIGHT[0, 0]}, f"out {CONTIGUOUS} (4, 3, 3)"),
    (
        "conv2d",
        {"weight": WEIGHT[:1]},
        "x must match weight (1, 8, 4, 3, 3) in branches and channels, got (2, 3, 4, 6, 5)",
    ),
    ("conv2d", {"x": X[:, :, :3]}, "x must match weight (2, 8, 4, 3, 3) in branches and channels, got (2, 3, 3, 6, 5)"),
    ("conv2d", {"x": X[0, :, :3]}, "x must match weight (2, 8, 4, 3, 3) in branches and channels, got (3, 3, 6, 5)"),
    ("conv2d", {"out": Y[:, :, :7]}, "out must have shape (2, 3, 8, 4, 3), got (2, 3, 7, 4, 3)"),
    ("conv2d", {"out": Y[0]}, "out must have shape (2, 3, 8, 4, 3), got (3, 8, 4, 3)"),
    ("conv2d", {"x": X[:, :2]}, "out must have shape (2, 2, 8, 4, 3), got (2, 3, 8, 4, 3)"),
    ("conv2d", {"x": X[..., :1]}, "out must have shape (2, 3, 8, 4, 0), got (2, 3, 8, 4, 3)"),
    ("conv2d_input_grad", {"grad": Y[:, :, :, 1:]}, "grad must have shape (2, 3, 8, 4, 3), got (2, 3, 8, 3, 3)"),
    ("conv2d_weight_grad", {"grad": Y[:1]}, "grad must have shape (2, 3, 8, 4, 3), got (1, 3, 8, 4, 3)"),
    ("conv2d_weight_grad", {"out": torch.zeros(2, 8, 4, 3, 2)}, "grad must have shape (2, 3, 8, 4, 4), got"),
    ("conv2d", {"weight": WEIGHT.double()}, "all tensors must have one dtype"),
    ("conv2d_input_grad", {"out": X.double()}, "all tensors must have one dtype"),
    ("conv2d_weight_grad", {"grad": Y.double()}, "all tensors must have one dtype"),
    *((name, tensors, "dtype must be float32 or float64") for name, tensors in HALF.items()),
]


@pytest.mark.parametrize("name", TRIPLE)
@pytest.mark.parametrize(("wrong", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_conv_kernels_refuse_settings(name, wrong, message):
    with pytest.raises(RuntimeError, match=re.escape(f"{name}_out: {message}")):
        getattr(torch.ops.bsfast, f"{name}_out")(*OPERANDS[name].values(), *(SETTINGS | wrong).values())


@pytest.mark.parametrize(("name", "wrong", "message"), BAD_TENSORS, ids=[f"{n}: {text}" for n, _, text in BAD_TENSORS])
def test_conv_kernels_refuse_tensors(name, wrong, message):
    with pytest.raises(RuntimeError, match=re.escape(f"{name}_out: {message}")):
        getattr(torch.ops.bsfast, f"{name}_out")(*(OPERANDS[name] | wrong).values(), *SETTINGS.values())


def test_conv_kernels_refuse_the_gradient_of_a_shared_input():
    # Summing over branches is possible only where their channels lie side by side.
    input_grad, geometry = torch.ops.bsfast.conv2d_input_grad_out, ((1, 1), (0, 0), (1, 1))
    with pytest.raises(RuntimeError, match=r"conv2d_input_grad_out: groups must be 1 for a shared input, got 2"):
        input_grad(Y, WEIGHT[:, :, :2].contiguous(), X[0], *geometry, 2)
    for name, grad, out in (("grad", Y.contiguous(), X[0]), ("out", Y, X[0].contiguous())):
        with pytest.raises(RuntimeError, match=rf"conv2d_input_grad_out: {name} must be batch-last in memory"):
            input_grad(grad, WEIGHT, out, *geometry, 1)


EMPTY = [
    ConvCase(2, 0, 2, 3, (4, 3), padding=(1, 1)),
    ConvCase(2, 0, 2, 3, (4, 3), padding=(1, 1), shared=True, order="batch_last"),
    ConvCase(0, 3, 2, 3, (4, 3), padding=(1, 1), order="batch_last"),
    ConvCase(2, 3, 2, 0, (4, 3), padding=(1, 1), order="batch_last"),
    ConvCase(2, 3, 0, 2, (4, 3), padding=(1, 1)),
    ConvCase(2, 3, 2, 2, (4, 0), padding=(1, 2), order="batch_last"),  # outputs read padding only
    ConvCase(2, 3, 2, 2, (4, 2)),  # no outputs
    ConvCase(2, 3, 2, 2, (2, 4), order="batch_last"),
]


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_conv_kernels_empty(case):
    # Sums of nothing: stock PyTorch refuses some of these shapes, but every result is zero or empty.
    space = [size + 2 * pad - 2 for size, pad in zip(case.size, case.padding, strict=True)]
    x = in_order(torch.randn(case.x_shape), case.order)
    grad = in_order(torch.randn(case.branches, case.samples, case.out_channels, *space), case.order)
    weight = torch.randn(case.weight_shape)
    for name, a, b, like in (
        ("conv2d", x, weight, grad),
        ("conv2d_input_grad", grad, weight, x),
        ("conv2d_weight_grad", x, grad, weight),
    ):
        if name in case.own_kernels:
            out = torch.full_like(like, torch.nan)
            run(name, case, a, b, out)
            assert torch.equal(out, torch.zeros_like(out)), name


def in_another_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code on a fresh import of bsfast, since it reads its environment only once."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


EVERY_KERNEL = """
import torch
from tests.ops.test_conv_kernels import CHUNKED, DTYPES, KERNEL_CASES, check_placed, kernels
torch.manual_seed(0)
torch.set_num_threads(1)
cases = KERNEL_CASES + [(*kernel, case) for case in CHUNKED[:2] for kernel in kernels(case)]
bits = dict.fromkeys([name for name, *_ in cases], 0)
for name, settings, case in cases:
    for dtype in DTYPES:
        bits[name] += check_placed(name, case, dtype, 0, **settings).contiguous().view(torch.int32).sum().item()
print(bits)
"""


def test_conv_kernels_on_every_instruction_set():
    from bsfast import _native

    sets = ["baseline", "avx2", "avx512"]
    bits = {}
    for isa in sets[: sets.index(_native.instruction_set()) + 1]:
        done = in_another_process(EVERY_KERNEL, BSFAST_ISA=isa)
        assert done.returncode == 0, done.stderr
        bits[isa] = done.stdout
    assert len(bits) == 1 or bits["baseline"] != bits["avx2"]  # without FMA the sums round otherwise: sets do differ


UNKNOWN = r"""
import pytest
from tests.ops.test_conv_kernels import DTYPES, NATIVE_CONV, TRIPLE, check_placed
for name in TRIPLE:
    message = rf"{name}_out: BSFAST_ISA must be an instruction set of this host \(baseline to \w+\), got sse9"
    with pytest.raises(ValueError, match=message):
        check_placed(name, NATIVE_CONV[0], DTYPES[0], 0)
"""


def test_conv_kernels_unknown_instruction_set():
    done = in_another_process(UNKNOWN, BSFAST_ISA="sse9")
    assert done.returncode == 0, done.stderr
