"""What the own convolution kernels do around a convolution, and their settings: prologue, epilogue, masks, patches."""

import pytest
import torch
from torch import Tensor

from bsfast import ops
from bsfast.ops.conv2d_kernels import input_grad
from tests.cases import ConvCase, in_order
from tests.ops.test_conv_kernels import (
    BOTH_ORDERS,
    DTYPES,
    KERNEL_CASES,
    SETTINGS,
    WEIGHT,
    WHY_NOT,
    X,
    Y,
    kernels,
)
from tests.tolerance import assert_close

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")


def tiles_of(case: ConvCase) -> tuple[int, ...]:
    """How the kernels can compute a case: directly, or by tiles of so many outputs along each axis."""
    plain = case.kernel == (3, 3) and case.stride == case.dilation == (1, 1) and max(case.padding) <= 2
    return (0, 2, 4) if plain and case.order == "batch_last" else (0,)


AROUND = [case for case in BOTH_ORDERS if not case.shared]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AROUND, ids=str)
def test_conv_kernels_prologue_and_epilogue(case, dtype):
    x, weight, truth = case.problem("conv2d", dtype)
    scale, shift = (torch.randn(x.shape[0], x.shape[2], dtype=dtype) for _ in range(2))
    factor, bias, mean, variance = (torch.randn(truth.shape[0], truth.shape[2], dtype=dtype) for _ in range(4))
    residual = in_order(torch.randn(truth.shape, dtype=dtype), case.order)
    out = in_order(torch.full(truth.shape, torch.nan, dtype=dtype), case.order)
    before = {"scale": scale, "shift": shift, "rectify": True}
    after = {"out_scale": factor, "bias": bias, "residual": residual, "relu": True}
    geometry = case.geometry.values()
    torch.ops.bsfast.conv2d_out(x, weight, out, *geometry, **before, **after, mean=mean, variance=variance)
    read, added = wide(scale) * x.double() + wide(shift), wide(bias) + residual.double()
    y = (wide(factor) * case.loop(read.relu(), weight.double()) + added).relu()
    assert_close(out, y, case.sum_length)
    single = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(mean.double(), y.mean((1, 3, 4)), rtol=single, atol=10 * single)
    torch.testing.assert_close(variance.double(), y.var((1, 3, 4), correction=0), rtol=10 * single, atol=10 * single)

    grad = in_order(torch.randn(truth.shape, dtype=dtype), case.order)
    for name, settings in kernels(case):
        if name == "conv2d_weight_grad":
            own = torch.full_like(weight, torch.nan)
            torch.ops.bsfast.conv2d_weight_grad_out(x, grad, own, *geometry, **before, **settings)
            expected = case.loop_grads(read.relu(), weight.double(), grad.double())[1]
            assert_close(own, expected, case.sum_length)


def wide(coefficients: Tensor) -> Tensor:
    return coefficients.double()[:, None, :, None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "tile"),
    [(case, tile) for name, _, case in KERNEL_CASES if name == "conv2d_input_grad" for tile in tiles_of(case)],
    ids=str,
)
def test_input_grad_adds_a_residual_and_applies_a_mask(case, tile, dtype):
    grad, weight, truth = case.problem("conv2d_input_grad", dtype)
    residual = in_order(torch.randn(truth.shape, dtype=dtype), case.order)
    mask = in_order(torch.randn(truth.shape, dtype=dtype).relu(), case.order)
    for beside, expected in [
        ({"residual": residual}, truth + residual),
        ({"mask": mask}, torch.where(mask > 0, truth, 0)),
        ({"residual": residual, "mask": mask}, torch.where(mask > 0, truth + residual, 0)),
    ]:
        out = in_order(torch.full(truth.shape, torch.nan, dtype=dtype), case.order)
        torch.ops.bsfast.conv2d_input_grad_out(grad, weight, out, *case.geometry.values(), winograd=tile, **beside)
        assert_close(out, expected, case.sum_length * (1 if tile == 0 else 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "tile"),
    [(case, tile) for name, _, case in KERNEL_CASES if name == "conv2d" for tile in tiles_of(case)],
    ids=str,
)
def test_conv2d_applies_a_mask(case, tile, dtype):
    x, weight, truth = case.problem("conv2d", dtype)
    residual, mask = (in_order(torch.randn(truth.shape, dtype=dtype), case.order) for _ in range(2))
    out = in_order(torch.full(truth.shape, torch.nan, dtype=dtype), case.order)
    around = {"winograd": tile, "residual": residual, "mask": mask}
    torch.ops.bsfast.conv2d_out(x, weight, out, *case.geometry.values(), **around)
    assert_close(out, torch.where(mask > 0, truth + residual, 0), case.sum_length * (1 if tile == 0 else 100))


@pytest.mark.parametrize("name", ["residual", "mask"])
def test_input_grad_refuses_what_does_not_fit_its_result(name):
    call = torch.ops.bsfast.conv2d_input_grad_out
    with pytest.raises(RuntimeError, match=name + r" must have shape \(2, 3, 4, 6, 5\), got \(2, 3, 4, 6, 4\)"):
        call(Y, WEIGHT, X, *SETTINGS.values(), **{name: X[..., :4]})
    with pytest.raises(RuntimeError, match=f"{name} must be batch-last in memory"):
        call(Y, WEIGHT, X, *SETTINGS.values(), **{name: X.contiguous()})
    with pytest.raises(RuntimeError, match="all tensors must have one dtype"):
        call(Y, WEIGHT, X, *SETTINGS.values(), **{name: X.double()})


@pytest.mark.parametrize("settings", [{}, {"patches": True}], ids=str)
def test_weight_grad_without_columns_is_zero(settings):
    x, grad, out = torch.randn(2, 3, 2, 4, 1), torch.empty(2, 3, 3, 2, 0), torch.full((2, 3, 2, 3, 3), torch.nan)
    torch.ops.bsfast.conv2d_weight_grad_out(x, grad, out, (1, 4), (0, 0), (1, 1), 1, **settings)
    assert out.eq(0).all()


def test_patches_of_long_sums_round_like_others():
    x, grad, out = torch.rand(1, 1, 16, 16384, 8), torch.rand(1, 1, 4, 16384, 8), torch.empty(1, 4, 16, 1, 1)
    x, grad = x.expand(16, -1, -1, -1, -1).contiguous(), grad.expand(16, -1, -1, -1, -1).contiguous()
    out = out.expand(16, -1, -1, -1, -1).contiguous()
    torch.ops.bsfast.conv2d_weight_grad_out(x, grad, out, (1, 1), (0, 0), (1, 1), 1, patches=True)
    truth = torch.einsum("mnohw,mnchw->moc", grad.double(), x.double())
    assert ((out[..., 0, 0] - truth).abs() / truth).max() < 3e-6


def test_input_grad_passes_where_the_mask_is_not_a_number():
    grad, weight, mask = torch.ones(1, 2, 1, 3, 3), torch.ones(1, 1, 1, 1, 1), torch.tensor([torch.nan, -1.0, 0.0])
    for order in ("batch_last", "contiguous", "channels_last"):  # the last by stock operators
        own = in_order(grad, order)
        settings = ((1, 1), (0, 0), (1, 1), 1)
        masked = input_grad(own, weight, grad.shape, *settings, mask=in_order(mask.expand(grad.shape).clone(), order))
        assert torch.equal(masked[0, 0, 0], torch.tensor([1.0, 0.0, 0.0]).expand(3, 3))


def test_folded_conv2d_takes_coefficients_in_any_order_in_memory():
    case = ConvCase(2, 3, 2, 4, (5, 4), padding=(1, 1), order="batch_last")
    x, weight, truth = case.problem("conv2d", torch.float64)
    scale, bias = (torch.randn(4, 2, dtype=torch.float64).t() for _ in range(2))
    y = ops.folded_conv2d(x, weight, bias, tuple(case.geometry.values()), None, scale=scale)
    assert_close(y, wide(scale) * truth + wide(bias), case.sum_length)


def test_conv_kernels_refuse_patches():
    with pytest.raises(RuntimeError, match="patches and winograd exclude each other"):
        torch.ops.bsfast.conv2d_weight_grad_out(X, Y, WEIGHT, (1, 1), (0, 0), (1, 1), 1, patches=True, winograd=2)
    with pytest.raises(RuntimeError, match=r"patches need a dilation of 1 along the width, got 2"):
        torch.ops.bsfast.conv2d_weight_grad_out(X, Y, WEIGHT, (1, 1), (0, 1), (1, 2), 1, patches=True)
