"""The per-sample weight gradient against autograd through a stock convolution of each sample."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

from bsfast.ops import conv2d_weight_grad, conv2d_weight_grad_per_sample, plan
from bsfast.ops.backend import native_why_not
from tests.cases import CONV, FEW_CONV, NATIVE_CONV, SMALL_CONV, ConvCase, conv_cases, in_order
from tests.ops.test_conv_kernels import in_another_process, placed
from tests.tolerance import assert_close

DTYPES = [torch.float64, torch.float32]
NEEDS_NATIVE = pytest.mark.skipif(
    native_why_not("cpu") is not None or torch.get_default_device().type != "cpu", reason="no own CPU kernels here"
)
KERNEL_CASES = [case for case in NATIVE_CONV if case.order == "batch_last"]


def seeds_of(case: ConvCase, seeds: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gradients of the output: ``seeds`` of every sample, one seed after the other."""
    grad = torch.cat([case.grad(dtype) for _ in range(seeds)], 1)
    return in_order(grad, "batch_last") if case.order == "batch_last" else grad


def truth(case: ConvCase, x: Tensor, grad: Tensor) -> Tensor:
    """Autograd through the loop over branches, for one sample after the other."""
    weight = torch.zeros(case.weight_shape, dtype=x.dtype)
    columns = [torch.zeros(*case.weight_shape, 0, dtype=x.dtype)]
    for n in range(grad.shape[1]):
        sample = x.narrow(-4, n % case.samples, 1)
        columns.append(torch.func.vjp(lambda w, s=sample: case.loop(s, w), weight)[1](grad[:, n : n + 1])[0][..., None])
    return torch.cat(columns, -1)


def per_sample(case: ConvCase, x: Tensor, grad: Tensor) -> Tensor:
    return conv2d_weight_grad_per_sample(x, grad, case.kernel, **case.geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("case", CONV, ids=str)
def test_sample_grad_equals_loop_over_samples(case, seeds, dtype):
    x, grad = case.x(dtype), seeds_of(case, seeds, dtype)
    result = per_sample(case, x, grad)
    assert result.is_contiguous()
    assert_close(result, truth(case, x.double(), grad.double()), case.sum_length, dtype)
    if seeds == 1:
        total = conv2d_weight_grad(x.double(), grad.double(), case.kernel, **case.geometry)
        assert_close(result.double().sum(-1).to(dtype), total, case.sum_length, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW_CONV, ids=str)
def test_sample_grad_half_precision(case, dtype):
    x, grad = case.x(dtype), seeds_of(case, 2, dtype)
    assert_close(per_sample(case, x, grad), truth(case, x.double(), grad.double()), case.sum_length, dtype)


def check_kernel(case: ConvCase, seeds: int, dtype: torch.dtype, offset: int) -> Tensor:
    """Run the kernel on operands at an offset, compare it with the truth, and return the result."""
    x, grad = case.x(dtype), seeds_of(case, seeds, dtype)
    expected = truth(case, x.double(), grad.double())
    x, grad = (placed(t, "batch_last", offset)[0].copy_(t) for t in (x, grad))
    memory = torch.full((offset + expected.numel() + 16,), 7.0, dtype=dtype)
    out = memory[offset : offset + expected.numel()].view(expected.shape)
    torch.ops.bsfast.conv2d_weight_grad_per_sample_out(x, grad, out, *case.geometry.values())
    assert_close(out, expected, case.sum_length)
    assert set(memory[:offset].tolist() + memory[-16:].tolist()) == {7}
    return out


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_sample_grad_kernel(case, dtype):
    check_kernel(case, 1, dtype, 0)
    check_kernel(case, 2, dtype, 3)


@NEEDS_NATIVE
@given(case=conv_cases(order="batch_last"), seeds=st.integers(1, 3), dtype=st.sampled_from(DTYPES))
def test_sample_grad_random_shapes(case, seeds, dtype):
    check_kernel(case, seeds, dtype, 0)


# Images of so many rows or channels that they are taken in parts, by one worker or by more.
LARGE = [
    ConvCase(1, 33, 8, 12, (33, 30), padding=(1, 1), order="batch_last"),
    ConvCase(2, 17, 40, 5, (9, 65), (3, 2), (2, 3), (1, 1), (1, 2), order="batch_last"),
    ConvCase(1, 20, 150, 2, (5, 103), (5, 1), padding=(2, 0), shared=True, order="batch_last"),
]


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_sample_grad_kernel_parts_of_images(case, dtype):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append(check_kernel(case, 3, dtype, 0))
    assert all(torch.equal(results[0], result) for result in results[1:])


EVERY_KERNEL = """
import torch
from tests.ops.test_conv2d_sample_grad import DTYPES, KERNEL_CASES, LARGE, check_kernel
torch.set_num_threads(1)
torch.manual_seed(0)
cases = [(case, dtype) for case in KERNEL_CASES[::3] + LARGE[:1] for dtype in DTYPES]
print(sum(check_kernel(case, 2, dtype, 0).view(torch.int32).sum() for case, dtype in cases))
"""


@NEEDS_NATIVE
def test_sample_grad_kernel_on_every_instruction_set():
    from bsfast import _native

    sets = ["baseline", "avx2", "avx512"]
    bits = {}
    for isa in sets[: sets.index(_native.instruction_set()) + 1]:
        done = in_another_process(EVERY_KERNEL, BSFAST_ISA=isa)
        assert done.returncode == 0, done.stderr
        bits[isa] = done.stdout
    assert len(bits) == 1 or bits["baseline"] != bits["avx2"]  # without FMA the sums round otherwise: sets do differ


@NEEDS_NATIVE
def test_sample_grad_plan():
    def choose(dtype: torch.dtype, samples: int, device: str = "cpu") -> plan.Plan:
        return plan.conv2d_weight_grad_per_sample(device=device, dtype=dtype, samples=samples)

    own = plan.Plan("native", "every vector lane is a sample: nothing is added up between lanes")
    assert choose(torch.float32, 4) == choose(torch.float64, 128) == own
    assert choose(torch.float16, 128) == plan.Plan("unfold", "torch.float16 has no own kernel")
    assert choose(torch.float32, 3) == plan.Plan("unfold", "fewer than 4 samples leave most vector lanes empty")
    assert choose(torch.float32, 128, "mps") == plan.Plan("unfold", "no own kernels for device type 'mps'")
    case = ConvCase(2, 5, 2, 3, (4, 3))
    with plan.noting() as notes:
        per_sample(case, case.x(), case.grad())  # contiguous memory is converted
    assert notes == [own]


@pytest.mark.parametrize("case", SMALL_CONV, ids=str)
def test_sample_grad_gradcheck(case):
    inputs = (case.x() / 4).requires_grad_(), (seeds_of(case, 2) / 4).requires_grad_()

    def function(x: Tensor, grad: Tensor) -> Tensor:
        return per_sample(case, x, grad)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


# On own kernels, too.
MORE = [*FEW_CONV, ConvCase(2, 5, 2, 4, (4, 3), (2, 3), (1, 2), (1, 1), groups=2, order="batch_last")]


@pytest.mark.parametrize("case", MORE, ids=str)
@pytest.mark.parametrize("raw", [False, True], ids=["function", "raw"])
def test_sample_grad_gradcheck_every_element(raw, case):
    def function(x: Tensor, grad: Tensor) -> Tensor:
        op = torch.ops.bsfast.conv2d_weight_grad_per_sample
        return op(x, grad, case.kernel, *case.geometry.values()) if raw else per_sample(case, x, grad)

    inputs = (case.x() / 4).requires_grad_(), (seeds_of(case, 2) / 4).requires_grad_()
    assert gradcheck(function, inputs, check_forward_ad=not raw, check_batched_grad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", MORE, ids=str)
def test_sample_grad_opcheck(case):
    op = torch.ops.bsfast.conv2d_weight_grad_per_sample.default
    x, grad = case.x().requires_grad_(), seeds_of(case, 2).requires_grad_()
    torch.library.opcheck(op, (x, grad, case.kernel, *case.geometry.values()))


@pytest.mark.parametrize("case", [FEW_CONV[1], ConvCase(1, 4, 2, 2, (3, 2), (2, 2), groups=2)], ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: hessian(lambda a, b: f(a, b).pow(3).sum(), (0, 1)),
        lambda f: jacfwd(jacfwd(lambda a, b: f(a, b).pow(3).sum(), (0, 1)), (0, 1)),
        lambda f: jacrev(lambda a, b: f(a * a, b.sin()).pow(2), (0, 1)),
    ],
    ids=["hessian", "jacfwd of jacfwd", "jacrev"],
)
def test_sample_grad_transforms(transform, case):
    # The truth has no nested forward mode, so it is written with a product of one-sample patches.
    x, grad = case.x() / 4, case.grad() / 4

    def plain(x: Tensor, grad: Tensor) -> Tensor:
        images = x.expand(case.branches, *case.x_shape[-4:])
        patches = torch.nn.functional.unfold(
            images.flatten(0, 1), case.kernel, case.dilation, case.padding, case.stride
        )
        patches = patches.reshape(case.branches, case.samples, case.groups, -1, patches.shape[-1])
        rows = grad.reshape(case.branches, case.samples, case.groups, -1, patches.shape[-1])
        return torch.einsum("mngol,mngpl->mgopn", rows, patches).reshape(*case.weight_shape, case.samples)

    assert_close(per_sample(case, x, grad), plain(x, grad), case.sum_length)
    leaves = torch.utils._pytree.tree_leaves
    actual = transform(lambda a, b: per_sample(case, a, b))(x, grad)
    for one, other in zip(leaves(actual), leaves(transform(plain)(x, grad)), strict=True):
        assert_close(one, other, case.sum_length)


@pytest.mark.parametrize("case", MORE, ids=str)
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (2, 1), (-1, None), (None, -2), (1, -1)], ids=str)
@pytest.mark.parametrize("raw", [False, True], ids=["function", "raw"])
def test_sample_grad_vmap(raw, in_dims, case):
    def function(x: Tensor, grad: Tensor) -> Tensor:
        op = torch.ops.bsfast.conv2d_weight_grad_per_sample
        return op(x, grad, case.kernel, *case.geometry.values()) if raw else per_sample(case, x, grad)

    pairs = [(case.x(), seeds_of(case, 2)) for _ in range(3)]
    x, grad = ([pair[i] for pair in pairs] if in_dims[i] is not None else [pairs[0][i]] * 3 for i in (0, 1))
    stacked = [t[0] if dim is None else torch.stack(t, dim) for t, dim in zip((x, grad), in_dims, strict=True)]
    expected = torch.stack([truth(case, *pair) for pair in zip(x, grad, strict=True)])
    assert_close(vmap(function, in_dims)(*stacked), expected, case.sum_length)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", MORE[1:3], ids=str)
def test_sample_grad_compiles_with_its_backward(case, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, grad: per_sample(case, x.sin(), grad).relu(), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for samples in (case.samples, case.samples + 2):
        bigger = replace(case, samples=samples)
        x, grad = bigger.x().requires_grad_(), bigger.grad().requires_grad_()
        expected = truth(bigger, x.sin(), grad).relu()
        actual = compiled(x, grad)
        assert_close(actual, expected, case.sum_length)
        t = torch.randn_like(actual)
        pairs = zip(*(torch.autograd.grad(y, (x, grad), t) for y in (actual, expected)), strict=True)
        for one, other in pairs:
            assert_close(one, other, case.sum_length)


X, GRAD = torch.zeros(2, 3, 4, 6, 5), torch.zeros(2, 6, 8, 4, 3)
SETTINGS = [
    ({"stride": 0}, "stride must be at least 1, got 0"),
    ({"padding": (0, -1)}, "padding must be at least 0, got (0, -1)"),
    ({"dilation": (1, 2, 3)}, "dilation must be an int or a pair of ints, got (1, 2, 3)"),
    ({"groups": 0}, "groups must be an int of at least 1, got 0"),
    ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
    ({"x": X[0, 0]}, "x must have shape (M, N, C_in, H, W) or (N, C_in, H, W), got (4, 6, 5)"),
    ({"groups": 3}, "groups must divide C_in=4 (at least 1), got 3"),
    ({"groups": 4, "grad": GRAD[:, :, :6]}, "groups must divide C_out=6, got 4"),
    ({"dilation": (1, 3)}, "x must have W + 2 * padding >= 7 for this kernel, got W=5 and padding 0"),
    ({"grad": GRAD[0]}, "grad must have shape (M=2, R*N, C_out, H_out, W_out), got (6, 8, 4, 3)"),
    ({"grad": GRAD[:1]}, "grad must have shape (M=2, R*N, C_out, H_out, W_out), got (1, 6, 8, 4, 3)"),
    ({"grad": GRAD[0], "x": X[0]}, "grad must have shape (M, R*N, C_out, H_out, W_out), got (6, 8, 4, 3)"),
    ({"grad": GRAD[:, :5]}, "grad must have shape (2, a multiple of N=3, 8, 4, 3), got (2, 5, 8, 4, 3)"),
    ({"x": X[:, :0]}, "grad must have shape (2, a multiple of N=0, 8, 4, 3), got (2, 6, 8, 4, 3)"),
    ({"grad": GRAD[..., 1:]}, "grad must have shape (2, a multiple of N=3, 8, 4, 3), got (2, 6, 8, 4, 2)"),
]


@pytest.mark.parametrize(("wrong", "message"), SETTINGS, ids=[message for _, message in SETTINGS])
def test_sample_grad_refuses(wrong, message):
    with pytest.raises(ValueError, match=f"^conv2d_weight_grad_per_sample: {re.escape(message)}$"):
        conv2d_weight_grad_per_sample(**({"x": X, "grad": GRAD, "kernel_size": (3, 3)} | wrong))


def test_sample_grad_refuses_kinds():
    name = "conv2d_weight_grad_per_sample"
    with pytest.raises(TypeError, match=rf"^{name}: grad must be a floating-point tensor, got torch\.int32$"):
        conv2d_weight_grad_per_sample(X, GRAD.int(), (3, 3))
    wanted = re.escape(f"(torch.float64, {X.device})")
    with pytest.raises(TypeError, match=rf"^{name}: x must have grad's dtype and device {wanted}, got"):
        conv2d_weight_grad_per_sample(X, GRAD.double(), (3, 3))


LAST_X, LAST_GRAD, OUT = in_order(X, "batch_last"), in_order(GRAD, "batch_last"), torch.zeros(2, 8, 4, 3, 3, 6)
MATCH = "x must match out (2, 8, 4, 3, 3, 6) in branches and channels, got"
LIMITS = "stride and dilation must be at least 1 and padding at least 0, got"
KERNEL_ERRORS = [
    ({"x": X[0, 0]}, "x must have 4 or 5 axes, got 3"),
    ({"out": OUT[0]}, "out must have 6 axes, got 5"),
    ({"stride": (1,)}, "stride, padding and dilation must be pairs, got (1)"),
    ({"stride": (0, 1)}, f"{LIMITS} (0, 1), (1, 1) and (0, 0)"),
    ({"padding": (0, -1)}, f"{LIMITS} (1, 1), (1, 1) and (0, -1)"),
    ({"groups": 3}, "groups must divide the 8 output channels, got 3"),
    ({"out": OUT[:, :, :, :0]}, "the kernel must have taps, got out (2, 8, 4, 0, 3, 6)"),
    ({"x": LAST_X[:1]}, f"{MATCH} (1, 3, 4, 6, 5)"),
    ({"x": LAST_X[:, :, :2]}, f"{MATCH} (2, 3, 2, 6, 5)"),
    ({"out": OUT[..., :5]}, "out must have a multiple of the 3 samples of x, got (2, 8, 4, 3, 3, 5)"),
    ({"x": LAST_X[:, :0]}, "out must have a multiple of the 0 samples of x, got (2, 8, 4, 3, 3, 6)"),
    ({"grad": LAST_GRAD[:, :3]}, "grad must have shape (2, 6, 8, 4, 3), got (2, 3, 8, 4, 3)"),
    ({"x": LAST_X.double()}, "all tensors must have one dtype"),
    ({"x": LAST_X.half(), "grad": LAST_GRAD.half(), "out": OUT.half()}, "dtype must be float32 or float64"),
    ({"out": OUT.transpose(3, 4)}, "out must be contiguous, got strides (1728, 216, 54, 6, 18, 1)"),
    ({"x": X}, "x must be batch-last in memory, got strides"),
    ({"grad": GRAD}, "grad must be batch-last in memory, got strides"),
]


@NEEDS_NATIVE
@pytest.mark.parametrize(("wrong", "message"), KERNEL_ERRORS, ids=[message for _, message in KERNEL_ERRORS])
def test_sample_grad_kernel_refuses(wrong, message):
    settings = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    arguments = {"x": LAST_X, "grad": LAST_GRAD, "out": OUT} | settings | wrong
    with pytest.raises(RuntimeError, match=re.escape(f"conv2d_weight_grad_per_sample_out: {message}")):
        torch.ops.bsfast.conv2d_weight_grad_per_sample_out(*arguments.values())


@NEEDS_NATIVE
def test_sample_grad_kernel_sums_over_no_positions():
    out = torch.full((2, 8, 4, 7, 3, 6), torch.nan)
    torch.ops.bsfast.conv2d_weight_grad_per_sample_out(LAST_X, LAST_GRAD[..., :0, :], out, (1, 1), (0, 0), (1, 1), 1)
    assert torch.equal(out, torch.zeros_like(out))
