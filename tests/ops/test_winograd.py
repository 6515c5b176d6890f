"""Winograd's kernels called directly: values, alignment, threads, what is done around them, refusals."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bsfast import ops
from bsfast.ops.backend import native_why_not
from tests.cases import NATIVE_CONV, TRIPLE, ConvCase, conv_cases, in_order

WHY_NOT = native_why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")
OWN = [
    ConvCase(2, 16, 8, 8, (8, 8), padding=(1, 1), order="batch_last"),
    ConvCase(1, 21, 5, 7, (9, 6), padding=(2, 0), order="batch_last"),
    ConvCase(3, 40, 32, 17, (3, 5), padding=(1, 2), order="batch_last"),
    ConvCase(2, 19, 6, 4, (5, 6), padding=(1, 1), groups=2, order="batch_last"),
    ConvCase(2, 64, 3, 4, (5, 6), padding=(1, 1), shared=True, order="batch_last"),
]


def is_supported(case: ConvCase) -> bool:
    plain = case.stride == case.dilation == (1, 1) and case.kernel == (3, 3) and max(case.padding) <= 2
    return plain and case.order == "batch_last" and 0 not in case.out_shape


CASES = OWN + [case for case in NATIVE_CONV if is_supported(case)]
# Of the relative L2 error, about ten times what was seen.
TOLERANCE = {(torch.float32, 2): 5e-6, (torch.float32, 4): 3e-5, (torch.float64, 2): 1e-14, (torch.float64, 4): 1e-13}


def assert_close(actual: Tensor, truth: Tensor, tile: int) -> None:
    error = torch.linalg.vector_norm(actual.double() - truth) / torch.linalg.vector_norm(truth)
    assert error <= TOLERANCE[actual.dtype, tile], f"relative L2 error {error:.3g}"


def run(name: str, case: ConvCase, a: Tensor, b: Tensor, out: Tensor, tile: int) -> Tensor:
    getattr(torch.ops.bsfast, f"{name}_out")(a, b, out, *case.geometry.values(), winograd=tile)
    return out


def poisoned(like: Tensor, name: str, case: ConvCase, dtype: torch.dtype) -> Tensor:
    order = "contiguous" if name == "conv2d_weight_grad" else case.order
    return in_order(torch.full(like.shape, torch.nan, dtype=dtype), order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_winograd(case, tile, dtype):
    check(case, tile, dtype)


PADDINGS = st.tuples(st.integers(0, 2), st.integers(0, 2))
PLAIN = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "order": "batch_last"}


@given(case=PADDINGS.flatmap(lambda padding: conv_cases(**PLAIN, padding=padding)), tile=st.sampled_from([2, 4]))
def test_winograd_random_shapes(case, tile):
    check(case, tile, torch.float32)


def check(case: ConvCase, tile: int, dtype: torch.dtype) -> None:
    for name in case.own_kernels:
        a, b, truth = case.problem(name, dtype)
        assert_close(run(name, case, a, b, poisoned(truth, name, case, dtype), tile), truth, tile)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("case", OWN, ids=str)
def test_winograd_does_not_depend_on_threads(case, tile):
    for name in case.own_kernels:
        a, b, truth = case.problem(name, torch.float32)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(name, case, a, b, poisoned(truth, name, case, torch.float32), tile))
        assert all(torch.equal(results[0], result) for result in results[1:]), name


@pytest.mark.parametrize("samples", [64, 65])  # with 64 all vectors are stored past the caches
@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_prologue_and_epilogue_of_large_results(tile, samples):
    case = ConvCase(2, samples, 3, 36, (32, 31), padding=(1, 1), order="batch_last")
    x, weight, truth = case.problem("conv2d", torch.float32)
    scale, shift, bias = torch.rand(2, 3), torch.rand(2, 3), torch.randn(2, 36)
    residual = in_order(torch.randn(truth.shape), "batch_last")
    mean, variance = torch.empty(2, 36), torch.empty(2, 36)
    around = {"scale": scale, "shift": shift, "rectify": True, "bias": bias, "residual": residual}
    out = poisoned(truth, "conv2d", case, torch.float32)
    geometry = case.geometry.values()
    torch.ops.bsfast.conv2d_out(x, weight, out, *geometry, winograd=tile, **around, mean=mean, variance=variance)
    assert out.nbytes > 16 * 2**20
    wide = [t.double()[:, None, :, None, None] for t in (scale, shift, bias)]
    y = case.loop((x.double() * wide[0] + wide[1]).relu(), weight.double())
    y = y + wide[2] + residual.double()
    assert_close(out, y, tile)
    torch.testing.assert_close(mean.double(), y.mean((1, 3, 4)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), y.var((1, 3, 4), correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_prologue_of_the_weight_gradient(tile):
    case = OWN[1]
    x, grad, truth = case.problem("conv2d_weight_grad", torch.float32)
    scale, shift = torch.rand(1, 5), torch.randn(1, 5)
    out = torch.empty(truth.shape)
    around = {"winograd": tile, "scale": scale, "shift": shift, "rectify": True}
    torch.ops.bsfast.conv2d_weight_grad_out(x, grad, out, *case.geometry.values(), **around)
    scaled = (x.double() * scale[:, None, :, None, None] + shift[:, None, :, None, None]).relu()
    assert_close(out, case.loop_grads(scaled, torch.zeros_like(truth), grad.double())[1], tile)


def test_winograd_is_used_and_can_be_switched_off(winograd_tile):
    case = replace(OWN[0], in_channels=32, out_channels=32)
    x, weight, truth = case.problem("conv2d", torch.float32)
    results = []
    for tile in (0, 2, 4):
        winograd_tile(tile)
        results.append(ops.conv2d(x, weight, **case.geometry))
        assert torch.equal(results[-1], run("conv2d", case, x, weight, poisoned(truth, "conv2d", case, x.dtype), tile))
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


UNFIT = "winograd takes kernels of 3x3 taps with stride and dilation 1 and padding of at most 2, on batch-last memory"
REFUSED = [
    (OWN[0], 3, "winograd must be 0, 2 or 4, got 3"),
    (replace(OWN[0], stride=(1, 2)), 2, UNFIT),
    (replace(OWN[0], dilation=(2, 1)), 2, UNFIT),
    (replace(OWN[0], kernel=(3, 1)), 4, UNFIT),
    (replace(OWN[0], padding=(1, 3)), 4, UNFIT),
    (replace(OWN[0], order="contiguous"), 2, UNFIT),
]


@pytest.mark.parametrize("name", TRIPLE)
@pytest.mark.parametrize(("case", "tile", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_winograd_refuses(name, case, tile, message):
    a, b, truth = case.problem(name, torch.float32)
    with pytest.raises(RuntimeError, match=re.escape(f"{name}_out: {message}")):
        run(name, case, a, b, poisoned(truth, name, case, torch.float32), tile)
