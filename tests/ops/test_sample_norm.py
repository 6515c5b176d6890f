"""Normalisation of samples with an affine map and an activation: against stock operators, and where it must not run."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast import ops
from bsfast.nn import functional
from bsfast.ops.backend import native_why_not
from tests.cases import in_order
from tests.ops.test_conv_kernels import in_another_process
from tests.tolerance import assert_close

WHY_NOT = native_why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")
# (M, N, C, H, W) and groups; 70 and 130 samples are a block of vectors and a rest.
CASES = [
    ((2, 17, 3, 5, 4), 3),
    ((1, 70, 4, 9, 7), 2),
    ((3, 130, 2, 3, 3), 1),
    ((2, 1, 6, 6, 5), 3),
    ((1, 5, 1, 1, 3), 1),
    ((2, 3, 4, 1, 1), 1),
    ((1, 2, 2, 70, 67), 2),
]
ORDERS = ["batch_last", "contiguous"]
COEFFICIENTS = [None, "channel", "sample"]
SLOPES = [1.0, 0.0, 0.2]


def loop(x: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, slope: float) -> Tensor:
    """The truth: one stock group normalisation a sample, and the rest by itself."""
    y = torch.stack([torch.stack([F.group_norm(sample[None], groups)[0] for sample in branch]) for branch in x])
    scale, shift = (t[:, None] if t is not None and t.dim() == 2 else t for t in (scale, shift))
    y = y if scale is None else y * scale[..., None, None]
    y = y if shift is None else y + shift[..., None, None]
    return y if slope == 1 else torch.where(y > 0, y, slope * y)


def operands(shape, order, dtype, kind="channel"):
    x = in_order((2 * torch.randn(shape, dtype=torch.float64) + 3).to(dtype), order)
    size = {None: None, "channel": (shape[0], shape[2]), "sample": shape[:3]}[kind]
    return [x, *(None if size is None else torch.randn(size, dtype=dtype) for _ in range(2))]


def leaves(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def run(tensors, groups, slope):
    y, _mean, _variance = ops.sample_norm(*tensors, num_groups=groups, negative_slope=slope)
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_sample_norm_and_gradients_are_those_of_the_loop(shape, groups, order, dtype):
    for kind, slope in itertools.product(COEFFICIENTS, SLOPES):
        own = leaves(operands(shape, order, dtype, kind))
        truth = leaves([None if t is None else t.double() for t in own])
        y, expected = run(own, groups, slope), loop(*truth, groups, slope)
        assert y.stride() == own[0].stride()
        assert_close(y, expected, 64)
        # Where float32 cannot tell the sign of the truth, the activation may decide otherwise: no gradient goes there.
        grad = torch.randn(y.shape, dtype=dtype) * (expected.detach().abs() > 1e-4)
        grads = torch.autograd.grad(y, [t for t in own if t is not None], grad)
        expected_grads = torch.autograd.grad(expected, [t for t in truth if t is not None], grad.double())
        assert grads[0].stride() == own[0].stride()
        for got, wanted in zip(grads, expected_grads, strict=True):
            # Gradients of x are differences of larger terms, above all in groups of few elements.
            assert_close(got, wanted, 64 + shape[1] * shape[3] * shape[4])


@pytest.mark.parametrize("order", ORDERS)
def test_sample_norm_returns_the_statistics(order):
    x, *_ = operands((3, 40, 4, 9, 8), order, torch.float32)
    _, mean, variance = ops.sample_norm(x, None, None, num_groups=2)
    expected_variance, expected_mean = torch.var_mean(x.double().reshape(3, 40, 2, -1), dim=3, correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(variance, expected_variance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_sample_norm_of_a_mean_far_larger_than_the_deviations_is_exact(order):
    x = in_order(1e-2 * torch.randn(2, 33, 4, 9, 7) + 1e3, order).requires_grad_()
    truth = x.detach().double().requires_grad_()
    y, _, variance = ops.sample_norm(x, None, None, num_groups=2, eps=1e-12)
    expected = F.group_norm(truth.flatten(0, 1), 2, eps=1e-12).view(x.shape)
    assert_close(y, expected, 1)
    torch.testing.assert_close(variance, truth.reshape(2, 33, 2, -1).var(3, correction=0), rtol=1e-6, atol=0)
    grad = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, truth, grad.double())[0], 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize("slope", SLOPES)
def test_sample_norm_gradcheck(slope, kind, order):
    tensors = [t for t in operands((2, 3, 4, 2, 3), order, torch.float64, kind) if t is not None]
    inputs = tuple(t.requires_grad_() for t in tensors)

    def call(*own):
        return run([*own, *[None] * (3 - len(own))], 2, slope)

    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["channel", "sample"])
def test_sample_norm_gives_the_gradients_that_are_needed(needed, kind):
    tensors = operands((2, 17, 4, 4, 4), "batch_last", torch.float64, kind)
    weight = torch.randn(tensors[0].shape, dtype=torch.float64)
    truth = leaves(tensors)
    expected = torch.autograd.grad((loop(*truth, 2, 0.2) * weight).sum(), [truth[i] for i in needed])
    own = [t.requires_grad_(i in needed) for i, t in enumerate(leaves(tensors))]
    for create_graph in (False, True):
        y = run(own, 2, 0.2)
        grads = torch.autograd.grad((y * weight).sum(), [own[i] for i in needed], create_graph=create_graph)
        for got, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_plan_sample_norm_reasons():
    x, scale, _ = operands((2, 17, 4, 4, 4), "batch_last", torch.float32)
    native = "batch-last: a group of channels is normalised while it is in cache"
    assert ops.plan_sample_norm(x, scale, None)[:2] == ("native", native)
    assert ops.plan_sample_norm(x.contiguous()).reason.startswith("contiguous: a group")
    assert ops.plan_sample_norm(x.half(), scale.half())[:2] == ("aten", "torch.float16 has no own kernel")
    assert ops.plan_sample_norm(x, scale.double())[:2] == ("aten", "operands of different dtypes or devices")
    assert ops.plan_sample_norm(x[..., ::2])[:2] == ("aten", "neither memory order has no own kernel")
    assert ops.plan_sample_norm(x[:, :0]).algorithm == "aten"
    assert ops.plan_sample_norm(x[0])[:2] == ("aten", "this shape has no own kernel")
    with torch.autograd.forward_ad.dual_level():
        assert ops.plan_sample_norm(x).algorithm == "aten"
    seen = []
    torch.func.grad(lambda t: (seen.append(ops.plan_sample_norm(t)), t.sum())[1])(x)
    assert seen[0].algorithm == "aten"


LAYERS = {
    "instance": lambda x, scale, shift: functional.instance_norm(x, weight=scale, bias=shift),
    "instance-leaky": lambda x, scale, shift: functional.instance_norm(x, weight=scale, negative_slope=0.2),
    "group": lambda x, scale, shift: functional.group_norm(x, 2, scale, shift, negative_slope=0.0),
    "adaptive": lambda x, scale, shift: functional.adaptive_instance_norm(
        x, *(t[:, None].expand(x.shape[:3]) for t in (scale, shift)), negative_slope=0.2
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_same_by_kernels_and_under_function_transforms(name):
    layer, (x, scale, shift) = LAYERS[name], operands((2, 17, 4, 4, 5), "batch_last", torch.float64)
    y = layer(x, scale, shift)
    two = torch.stack([x, x.flip(0)])
    torch.testing.assert_close(torch.func.vmap(layer, (0, None, None))(two, scale, shift)[0], y)
    v = torch.randn_like(x)
    value, tangent = torch.func.jvp(lambda t: layer(t, scale, shift), (x,), (v,))
    torch.testing.assert_close(value, y)
    step = 1e-5
    difference = (layer(x + step * v, scale, shift) - layer(x - step * v, scale, shift)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-4, atol=1e-5)
    expected = torch.func.grad(lambda t: layer(t, scale, shift).pow(3).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(layer(leaf, scale, shift).pow(3).sum(), leaf)[0], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_the_kernels(name, monkeypatch):
    x, scale, shift = operands((2, 17, 4, 4, 5), "batch_last", torch.float32)
    calls, own = [], ops.sample_norm
    monkeypatch.setattr(ops, "sample_norm", lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1])
    LAYERS[name](x, scale, shift)
    assert calls == [1]


@pytest.mark.parametrize("order", ORDERS)
def test_instance_norm_moves_running_statistics_as_stock_does(order):
    x, weight, bias = operands((2, 17, 4, 4, 5), order, torch.float32)
    running = [torch.randn(2, 4), torch.rand(2, 4)]
    expected = [t.clone() for t in running]
    y = functional.instance_norm(x, *running, weight, bias, momentum=0.3)
    for k in range(2):
        stock = F.instance_norm(x[k], *(t[k] for t in expected), weight[k], bias[k], momentum=0.3)
        assert_close(y[k], stock, 64)
    for got, wanted in zip(running, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_adaptive_instance_norm_is_instance_norm_with_a_map_of_each_sample():
    for dtype in (torch.float64, torch.bfloat16):  # of which the latter has no own kernel
        x, gamma, beta = (t.to(dtype) for t in operands((2, 17, 4, 4, 5), "batch_last", torch.float64, "sample"))
        plain = torch.stack([F.instance_norm(branch) for branch in x])
        expected = F.leaky_relu((1 + gamma)[..., None, None] * plain + beta[..., None, None], 0.2)
        assert_close(functional.adaptive_instance_norm(x, gamma, beta, negative_slope=0.2), expected, 64)


def test_layers_refuse_what_stock_ones_refuse():
    pixel = torch.randn(2, 3, 4, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        functional.instance_norm(pixel)
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        functional.adaptive_instance_norm(pixel, torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        functional.group_norm(pixel[:1, :1], 4)
    with pytest.raises(RuntimeError, match="divisible by num_groups"):
        functional.group_norm(torch.randn(2, 3, 4, 5, 5), 3)
    with pytest.raises(ValueError, match="x must have C=5 channels"):
        functional.group_norm(torch.randn(2, 3, 4, 5, 5), 2, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"and beta \(M, N, C\), got \(2, 3, 4, 5, 5\) and \(2, 4\)"):
        functional.adaptive_instance_norm(torch.randn(2, 3, 4, 5, 5), torch.zeros(2, 3, 4), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("shape", "scale", "groups", "slope", "message"),
    [
        ((3, 4, 5, 5), None, 1, 1.0, "x must have shape (M, N, C, H, W), got (3, 4, 5, 5)"),
        ((2, 3, 4, 5, 5), (4,), 1, 1.0, "scale must have shape (M=2, C=4) or (M=2, N=3, C=4), got (4,)"),
        ((2, 3, 4, 5, 5), None, 3, 1.0, "num_groups must divide C=4, got 3"),
        ((2, 3, 4, 5, 5), None, 0, 1.0, "num_groups must divide C=4, got 0"),
        ((2, 3, 4, 5, 5), None, 2, -0.1, "negative_slope must be at least 0, got -0.1"),
    ],
)
def test_sample_norm_names_what_is_wrong(shape, scale, groups, slope, message):
    scale = None if scale is None else torch.ones(scale)
    with pytest.raises(ValueError, match=f"^sample_norm: {re.escape(message)}$"):
        ops.sample_norm(torch.randn(shape), scale, None, num_groups=groups, negative_slope=slope)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x must have shape (M, N, C, H, W), got (2, 3)"),
        ({"groups": 3}, "groups must divide C=4, got 3"),
        ({"y": torch.zeros(2, 3, 4, 5, 7)}, "every activation must have shape (2, 3, 4, 5, 6), got (2, 3, 4, 5, 7)"),
        ({"y": torch.zeros(2, 3, 4, 5, 6).double()}, "all tensors must have one dtype"),
        ({"x": torch.zeros(2, 3, 4, 6, 5).mT}, "every activation must be batch-last in memory, got strides"),
        ({"mean": torch.zeros(2, 2, 3).double()}, "every statistic must have shape (2, 3, 2), got (2, 2, 3)"),
        ({"inv": torch.zeros(2, 3, 2)}, "every statistic must be contiguous and have the right dtype"),
        ({"scale": torch.zeros(4, 2).T}, "scale must be contiguous and have x's dtype"),
        ({"scale": torch.zeros(2, 5)}, "scale must have shape (2, 4), got (2, 5)"),
        ({"shift": torch.zeros(2, 4, 3)}, "shift must have shape (2, 3, 4), got (2, 4, 3)"),
        ({"shift": torch.zeros(2, 3, 4).double()}, "shift must be contiguous and have the right dtype"),
    ],
)
def test_sample_norm_out_guards_memory(change, message):
    given = {name: torch.zeros(2, 3, 4, 5, 6) for name in ("x", "y")} | {"groups": 2}
    given |= {name: torch.zeros(2, 4) for name in ("scale", "shift")}
    given |= {name: torch.zeros(2, 3, 2).double() for name in ("mean", "inv", "variance")}
    given |= change
    order = ("x", "scale", "shift", "y", "mean", "inv", "variance", "groups")
    with pytest.raises(RuntimeError) as error:
        torch.ops.bsfast.sample_norm_out(*(given[name] for name in order), 1e-5, 1.0)
    assert f"sample_norm_out: {message}" in str(error.value)


def test_sample_norm_grad_out_guards_memory():
    x, stat, one = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 2).double(), torch.zeros(2, 3, 4)
    with pytest.raises(
        RuntimeError, match=r"sample_norm_grad_out: shift_grad must have shape \(2, 3, 4\), got \(2, 4\)"
    ):
        torch.ops.bsfast.sample_norm_grad_out(x, x, x, None, stat, stat, x, one, torch.zeros(2, 4), 2, 1.0)


BITS = """
import torch
from bsfast import ops
from tests.cases import in_order
torch.manual_seed(0)
for order in ("batch_last", "contiguous"):
    x = in_order(torch.randn(3, 97, 4, 9, 7), order).requires_grad_()
    scale = torch.randn(3, 97, 4, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, *_ = ops.sample_norm(x, scale, None, num_groups=2, negative_slope=0.2)
        grads = torch.autograd.grad((y * y).sum(), (x, scale))
        results.append((y, *grads))
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again))
    expected = torch.nn.functional.group_norm(x.flatten(0, 1), 2).view(x.shape) * scale[..., None, None]
    expected = torch.nn.functional.leaky_relu(expected, 0.2)
    torch.testing.assert_close(y, expected)
    expected_grads = torch.autograd.grad((expected * expected).sum(), (x, scale))
    for got, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
"""


def test_sample_norm_on_every_instruction_set():
    from bsfast import _native

    sets = ["baseline", "avx2", "avx512"]
    for name in sets[: sets.index(_native.instruction_set()) + 1]:
        done = in_another_process(BITS, BSFAST_ISA=name)
        assert done.returncode == 0, done.stderr


def test_sample_norm_differentiable_gradients_of_operands_that_depend_on_each_other():
    def of(function, x):
        return function(x, x.mean((3, 4)), x.amax((3, 4)))

    x = in_order(torch.randn(2, 5, 3, 4, 3, dtype=torch.float64), "batch_last").requires_grad_()
    own = lambda x, a, b: ops.sample_norm(x, a, b, num_groups=3)[0]  # noqa: E731
    stock = lambda x, a, b: F.group_norm(x.flatten(0, 1), 3).view(x.shape) * a[..., None, None] + b[..., None, None]  # noqa: E731
    (found,) = torch.autograd.grad(of(own, x).pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(of(stock, x).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*[torch.autograd.grad(g.square().sum(), x)[0] for g in (found, expected)])
