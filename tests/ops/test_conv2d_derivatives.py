"""Derivatives of the convolution triple of every kind and order: finite differences, and torch.func on a plain loop."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from bsfast.ops import conv2d, conv2d_input_grad, conv2d_weight_grad
from tests.cases import FEW_CONV, SMALL_CONV, TRIPLE, ConvCase
from tests.tolerance import assert_close

Pair = tuple[Tensor, Tensor]


def operands(case: ConvCase, name: str) -> Pair:
    """Both operands, scaled so that third powers in the tests below stay near 1."""
    a = case.grad() if name == "conv2d_input_grad" else case.x()
    b = case.grad() if name == "conv2d_weight_grad" else case.weight()
    return a / 4, b / 4


def operator(case: ConvCase, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "conv2d":
        return lambda x, weight: conv2d(x, weight, **case.geometry)
    if name == "conv2d_input_grad":
        return lambda grad, weight: conv2d_input_grad(grad, weight, case.x_shape, **case.geometry)
    return lambda x, grad: conv2d_weight_grad(x, grad, case.kernel, **case.geometry)


def truth(case: ConvCase, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The same function of plain PyTorch: the loop, or its vector-Jacobian product by torch.func."""
    if name == "conv2d":
        return case.loop
    if name == "conv2d_input_grad":
        x = torch.zeros(case.x_shape, dtype=torch.float64)
        return lambda grad, weight: vjp(lambda x: case.loop(x, weight), x)[1](grad)[0]
    weight = torch.zeros(case.weight_shape, dtype=torch.float64)
    return lambda x, grad: vjp(lambda weight: case.loop(x, weight), weight)[1](grad)[0]


def cube_sum(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A scalar whose derivatives up to the sixth order do not vanish."""
    return lambda a, b: function(a, b).pow(3).sum()


def weighted(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A nonlinear function of both operands with a tensor result."""
    return lambda a, b: function(a * a, b.sin()).pow(2)


@pytest.mark.parametrize("case", SMALL_CONV, ids=str)
@pytest.mark.parametrize("name", TRIPLE)
def test_conv2d_gradcheck(name, case):
    a, b = operands(case, name)
    inputs = (a.requires_grad_(), b.requires_grad_())
    assert gradcheck(operator(case, name), inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(operator(case, name), inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", FEW_CONV, ids=str)
@pytest.mark.parametrize("name", TRIPLE)
def test_conv2d_gradcheck_every_element(name, case):
    a, b = operands(case, name)
    inputs = (a.requires_grad_(), b.requires_grad_())
    function = operator(case, name)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True)


@pytest.mark.parametrize("case", FEW_CONV, ids=str)
@pytest.mark.parametrize("name", TRIPLE)
def test_conv2d_raw_operator_gradcheck(name, case):
    a, b = operands(case, name)
    sizes = {"conv2d": (), "conv2d_input_grad": (case.x_shape,), "conv2d_weight_grad": (case.kernel,)}[name]
    raw = getattr(torch.ops.bsfast, name)

    def function(a: Tensor, b: Tensor) -> Tensor:
        return raw(a, b, *sizes, *case.geometry.values())

    inputs = (a.requires_grad_(), b.requires_grad_())
    assert gradcheck(function, inputs, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


TRANSFORMS = {
    "grad": lambda f: grad(cube_sum(f), (0, 1)),
    "jacrev": lambda f: jacrev(weighted(f), (0, 1)),
    "jacfwd": lambda f: jacfwd(weighted(f), (0, 1)),
    "hessian": lambda f: hessian(cube_sum(f), (0, 1)),
    "jacrev_of_jacrev": lambda f: jacrev(jacrev(cube_sum(f), (0, 1)), (0, 1)),
    "jacrev_of_jvp": lambda f: jacrev(lambda a, b: jvp(cube_sum(f), (a, b), (b.sum() * a, b))[1], (0, 1)),
    "jacfwd_of_jacfwd": lambda f: jacfwd(jacfwd(cube_sum(f), (0, 1)), (0, 1)),
    "jvp_of_jvp_of_grad": lambda f: lambda a, b: jvp(
        lambda a, b: jvp(grad(cube_sum(f), (0, 1)), (a, b), (b.sum() * a, b))[1], (a, b), (a.cos(), b.cos())
    ),
    "jvp_of_grad_one_operand": lambda f: lambda a, b: jvp(lambda a: grad(cube_sum(f), (0, 1))(a, b), (a,), (a.sin(),)),
    "jvp_other_operand": lambda f: lambda a, b: jvp(lambda b: weighted(f)(a, b), (b,), (b.sin(),)),
    "third_order": lambda f: lambda a, b: grad(lambda a: jvp(grad(cube_sum(f)), (a, b), (a.sin(), b))[1].pow(2).sum())(
        a
    ),
    # The function runs under one forward-mode level, its backward under two.
    "jacfwd_of_jacfwd_through_vjp": lambda f: lambda a, b: jacfwd(
        lambda a: jacfwd(lambda t: vjp(lambda b: f(a, b), b)[1](t)[0])(torch.ones_like(f(a, b)))
    )(a),
}


@pytest.mark.parametrize("case", FEW_CONV[1:3], ids=str)
@pytest.mark.parametrize("name", TRIPLE)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_conv2d_transforms_equal_those_of_the_loop(transform, name, case):
    a, b = operands(case, name)
    if transform == "jacfwd_of_jacfwd_through_vjp" and name != "conv2d":
        pytest.skip("the truth is itself a vjp, whose aten derivative has no nested forward mode")
    actual = TRANSFORMS[transform](operator(case, name))(a, b)
    expected = TRANSFORMS[transform](truth(case, name))(a, b)
    leaves = torch.utils._pytree.tree_leaves
    for one, other in zip(leaves(actual), leaves(expected), strict=True):
        assert_close(one, other, case.sum_length)


@pytest.mark.parametrize("case", FEW_CONV, ids=str)
@pytest.mark.parametrize("name", TRIPLE)
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (2, 1), (-1, None), (None, -2), (1, -1)], ids=str)
@pytest.mark.parametrize("raw", [False, True], ids=["function", "raw"])
def test_conv2d_vmap(raw, in_dims, name, case):
    function = operator(case, name)
    if raw:
        sizes = {"conv2d": (), "conv2d_input_grad": (case.x_shape,), "conv2d_weight_grad": (case.kernel,)}[name]
        function = lambda a, b: getattr(torch.ops.bsfast, name)(a, b, *sizes, *case.geometry.values())  # noqa: E731
    pairs = [operands(case, name) for _ in range(3)]
    a, b = ([pair[i] for pair in pairs] if in_dims[i] is not None else [pairs[0][i]] * 3 for i in (0, 1))
    stacked = [t[0] if dim is None else torch.stack(t, dim) for t, dim in zip((a, b), in_dims, strict=True)]
    expected = torch.stack([truth(case, name)(one, other) for one, other in zip(a, b, strict=True)])
    assert_close(vmap(function, in_dims)(*stacked), expected, case.sum_length)


@pytest.mark.parametrize("case", FEW_CONV, ids=str)
@pytest.mark.parametrize("name", TRIPLE)
def test_conv2d_nested_vmap_and_per_sample_gradients(name, case):
    pairs = [operands(case, name) for _ in range(6)]
    a = torch.stack([pair[0] for pair in pairs]).unflatten(0, (2, 3))
    b = torch.stack([pair[1] for pair in pairs[:3]])
    mapped = vmap(vmap(grad(cube_sum(operator(case, name)), (0, 1))), (0, None))(a, b)
    for i in range(2):
        for j in range(3):
            expected = grad(cube_sum(truth(case, name)), (0, 1))(a[i, j], b[j])
            for actual, wanted in zip(mapped, expected, strict=True):
                assert_close(actual[i, j], wanted, case.sum_length)


def test_conv2d_nested_forward_mode_is_why_the_composite_exists(monkeypatch):
    # Should torch make Function.jvp right under two levels, this fails and the composite can go.
    case = FEW_CONV[0]
    a, b = operands(case, "conv2d")

    def derivative(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return jvp(lambda a, b: jvp(function, (a, b), (a.sin(), b.cos()))[1], (a, b), (a.cos(), b.sin()))[1]

    expected = derivative(case.loop)
    assert_close(derivative(operator(case, "conv2d")), expected, case.sum_length)
    monkeypatch.setattr("bsfast.ops.bilinear.forward_mode_levels", lambda: 0)
    assert not torch.allclose(derivative(operator(case, "conv2d")), expected)


def test_forward_mode_levels_refuses_a_torch_that_hides_them(monkeypatch):
    from bsfast.ops.functorch import forward_mode_levels

    assert forward_mode_levels() == 0
    assert jvp(lambda t: t * forward_mode_levels(), (torch.ones(1),), (torch.ones(1),))[0].item() == 1
    monkeypatch.delattr("torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters")
    with pytest.raises(RuntimeError, match=r"^bsfast: this torch hides torch\.func's stack of transforms"):
        forward_mode_levels()
