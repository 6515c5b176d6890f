"""The own 3x3 kernel called directly: alignment, stores past the caches, instruction sets, and what guards memory."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bsfast.ops.backend import native_why_not
from tests.cases import NATIVE_CONV, ConvCase, in_order
from tests.tolerance import assert_close

WHY_NOT = native_why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")
DTYPES = [torch.float64, torch.float32]


def batch_last_at(offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Batch-last NaN that starts ``offset`` elements into its allocation, between two margins of 7."""
    strides = in_order(torch.empty(shape), "batch_last").stride()
    memory = torch.full((offset + torch.Size(shape).numel() + 7,), torch.nan, dtype=dtype)
    memory[:offset] = memory[memory.numel() - 7 :] = 7
    return memory.as_strided(shape, strides, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NATIVE_CONV, ids=str)
def test_conv3x3_at_any_alignment(case, dtype):
    for offset in (0, 1, 3):
        x = batch_last_at(offset, case.x_shape, dtype).copy_(case.x(dtype))
        weight, out = case.weight(dtype), batch_last_at(offset + 1, case.out_shape, dtype)
        torch.ops.bsfast.conv3x3(x, weight, out, *case.padding)
        assert_close(out, case.loop(x.double(), weight.double()), case.sum_length)
        margins = torch.cat([m.as_strided((n,), (1,), at) for m, n, at in ends(out, offset + 1)])
        assert torch.equal(margins, torch.full_like(margins, 7))


def ends(t: Tensor, offset: int) -> list[tuple[Tensor, int, int]]:
    """Both margins of batch_last_at: tensor, length, start."""
    return [(t, offset, 0), (t, 7, offset + t.numel())]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("samples", [64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv3x3_large_results(dtype, samples, offset):
    # Above 16 MiB full vectors are stored past the caches, if every one of them is aligned.
    case = ConvCase(2, samples, 1, 36, (32, 31), padding=(1, 1), order="batch_last")
    x, weight = case.x(dtype), case.weight(dtype)
    out = batch_last_at(16 + offset, case.out_shape, dtype)
    assert out.nbytes > 16 * 2**20
    torch.set_num_threads(2)
    torch.ops.bsfast.conv3x3(x, weight, out, 1, 1)
    assert_close(out, case.loop(x, weight), case.sum_length)


X, WEIGHT = torch.zeros(2, 3, 4, 6, 5), torch.zeros(2, 8, 4, 3, 3)
OUT = torch.zeros(2, 3, 8, 4, 3)
BAD_CALLS = {
    "x must be batch-last in memory, got strides (360, 120, 30, 5, 1) for shape (2, 3, 4, 6, 5)": {"x": X.contiguous()},
    "out must be batch-last in memory, got strides": {"out": OUT.contiguous()},
    "x must have 4 or 5 axes, got 3": {"x": X[0, 0]},
    "out must have 4 or 5 axes, got 2": {"out": OUT[0, 0, 0]},
    "weight must be contiguous with shape (M, C_out, C_in, 3, 3), got (2, 8, 4, 3, 3)": {
        "weight": WEIGHT.transpose(-1, -2)
    },
    "weight must be contiguous with shape (M, C_out, C_in, 3, 3), got (2, 8, 4, 3, 2)": {
        "weight": torch.zeros(2, 8, 4, 3, 2)
    },
    "weight must be contiguous with shape (M, C_out, C_in, 3, 3), got (8, 4, 3, 3)": {"weight": WEIGHT[0]},
    "x must match weight (1, 8, 4, 3, 3) in branches and channels, got (2, 3, 4, 6, 5)": {"weight": WEIGHT[:1]},
    "x must match weight (2, 8, 4, 3, 3) in branches and channels, got (2, 3, 3, 6, 5)": {"x": X[:, :, :3]},
    "out must have shape (2, 3, 8, 4, 3), got (2, 3, 7, 4, 3)": {"out": OUT[:, :, :7]},
    "out must have shape (2, 3, 8, 6, 3), got (2, 3, 8, 4, 3)": {"pad_height": 1},
    "out must have shape (2, 3, 8, 4, 3), got (3, 8, 4, 3)": {"out": OUT[0]},
    "out must have shape (2, 2, 8, 4, 3), got (2, 3, 8, 4, 3)": {"x": X[:, :2]},
    "padding must be at least 0, got 0 and -1": {"pad_width": -1},
    "x, weight and out must have one dtype": {"weight": WEIGHT.double()},
    "x, weight and out must have one dtype.": {"out": OUT.double()},
    "dtype must be float32 or float64": {"x": X.half(), "weight": WEIGHT.half(), "out": OUT.half()},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_conv3x3_guards_memory(message):
    arguments = {"x": X, "weight": WEIGHT, "out": OUT, "pad_height": 0, "pad_width": 0} | BAD_CALLS[message]
    for name in ("x", "out"):
        if not message.startswith(f"{name} must be batch-last") and arguments[name].dim() > 3:
            arguments[name] = in_order(arguments[name], "batch_last")
    with pytest.raises(RuntimeError, match=re.escape(f"conv3x3: {message.rstrip('.')}")):
        torch.ops.bsfast.conv3x3(*arguments.values())


def test_conv3x3_empty():
    x, out = X[:, :0], OUT[:, :0]
    torch.ops.bsfast.conv3x3(x, WEIGHT, out, 0, 0)
    with pytest.raises(RuntimeError, match="out must have shape"):  # an image too small for the kernel
        torch.ops.bsfast.conv3x3(in_order(X[..., :1], "batch_last"), WEIGHT, OUT[..., :0], 0, 0)


def in_another_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code on a fresh import of bsfast, since it reads its environment only once."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


ERRORS_AND_BITS = """
import json, torch
from tests.cases import NATIVE_CONV
from bsfast.ops import conv2d
torch.manual_seed(0)
errors = []
for case in NATIVE_CONV:
    for dtype in (torch.float64, torch.float32):
        x, weight = case.x(dtype), case.weight(dtype)
        y, truth = conv2d(x, weight, **case.geometry), case.loop(x.double(), weight.double())
        error = torch.linalg.vector_norm(y.double() - truth) / torch.linalg.vector_norm(truth)
        errors.append([str(case), str(dtype), error.item() / torch.finfo(dtype).eps / case.sum_length**0.5])
print(json.dumps([errors, y.contiguous().view(torch.int32).sum().item()]))
"""


def test_conv3x3_on_every_instruction_set():
    from bsfast import _native

    sets = ["baseline", "avx2", "avx512"]
    bits = {}
    for name in sets[: sets.index(_native.instruction_set()) + 1]:
        done = in_another_process(ERRORS_AND_BITS, BSFAST_ISA=name)
        assert done.returncode == 0, done.stderr
        errors, bits[name] = json.loads(done.stdout)
        assert max(error for *_, error in errors) < 4  # the bound of tolerance.py
    assert len(bits) == 1 or bits["baseline"] != bits["avx2"]  # without FMA the sums round otherwise: sets do differ


def test_conv3x3_unknown_instruction_set():
    done = in_another_process(ERRORS_AND_BITS, BSFAST_ISA="sse9")
    message = r"conv3x3: BSFAST_ISA must be an instruction set of this host \(baseline to \w+\), got sse9"
    assert done.returncode != 0
    assert re.search(message, done.stderr)
