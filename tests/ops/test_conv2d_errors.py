"""Every message of the convolution triple's public functions."""

import re

import pytest
import torch

from bsfast.ops import conv2d, conv2d_input_grad, conv2d_weight_grad

X, WEIGHT = torch.zeros(2, 3, 4, 6, 5), torch.zeros(2, 8, 4, 3, 3)
GRAD = torch.zeros(2, 3, 8, 4, 3)
DEVICE = torch.get_default_device().type
ARGUMENTS = {
    conv2d: {"x": X, "weight": WEIGHT},
    conv2d_input_grad: {"grad": GRAD, "weight": WEIGHT, "input_size": X.shape},
    conv2d_weight_grad: {"x": X, "grad": GRAD, "kernel_size": (3, 3)},
}

SETTINGS = [
    ({"stride": 0}, r"stride must be at least 1, got 0"),
    ({"stride": (1, 2, 3)}, r"stride must be an int or a pair of ints, got \(1, 2, 3\)"),
    ({"stride": 1.5}, r"stride must be an int or a pair of ints, got 1\.5"),
    ({"padding": (0, -1)}, r"padding must be at least 0, got \(0, -1\)"),
    ({"padding": "same"}, r"padding must be an int or a pair of ints, got 'same'"),
    ({"dilation": [1, 0]}, r"dilation must be at least 1, got \[1, 0\]"),
    ({"groups": 0}, r"groups must be an int of at least 1, got 0"),
    ({"groups": 2.0}, r"groups must be an int of at least 1, got 2\.0"),
]
SHAPES = [
    (conv2d, {"x": X[0, 0]}, r"x must have shape \(M, N, C_in, H, W\) or \(N, C_in, H, W\), got \(4, 6, 5\)"),
    (conv2d, {"x": X[:, :, :0]}, r"groups must divide C_in=0 \(at least 1\), got 1"),
    (conv2d, {"groups": 3}, r"groups must divide C_in=4 \(at least 1\), got 3"),
    (
        conv2d,
        {"weight": WEIGHT[:1]},
        r"weight must have shape \(M=2, C_out, C_in=4, kH, kW\), none of them 0, got \(1, 8, 4, 3, 3\)",
    ),
    (conv2d, {"weight": WEIGHT[:, :, :3]}, r"weight must have shape .*C_in=4.*, got \(2, 8, 3, 3, 3\)"),
    (conv2d, {"weight": WEIGHT[0]}, r"weight must have shape .*, got \(8, 4, 3, 3\)"),
    (conv2d, {"weight": WEIGHT[:, :0]}, r"weight must have shape .*, none of them 0, got \(2, 0, 4, 3, 3\)"),
    (conv2d, {"x": X[0], "weight": WEIGHT[:0]}, r"weight must have shape \(M, C_out, .*, got \(0, 8, 4, 3, 3\)"),
    (conv2d, {"groups": 2, "weight": WEIGHT[:, :7, :2]}, r"groups must divide C_out=7, got 2"),
    (conv2d, {"dilation": (1, 3)}, r"x must have W \+ 2 \* padding >= 7 for this kernel, got W=5 and padding 0"),
    (conv2d, {"x": X[..., :2, :]}, r"x must have H \+ 2 \* padding >= 3 for this kernel, got H=2 and padding 0"),
    (conv2d_input_grad, {"input_size": (3, 2)}, r"input_size must have shape .*, got \(3, 2\)"),
    (
        conv2d_input_grad,
        {"input_size": (2, 3, 4, 6, 6)},
        r"grad must have shape \(2, 3, 8, 4, 4\), got \(2, 3, 8, 4, 3\)",
    ),
    (conv2d_input_grad, {"grad": GRAD[:, :2]}, r"grad must have shape \(2, 3, 8, 4, 3\), got \(2, 2, 8, 4, 3\)"),
    (conv2d_input_grad, {"grad": GRAD[0]}, r"grad must have shape \(2, 3, 8, 4, 3\), got \(3, 8, 4, 3\)"),
    (conv2d_input_grad, {"weight": WEIGHT[:, :, :2]}, r"weight must have shape .*C_in=4.*, got \(2, 8, 2, 3, 3\)"),
    (conv2d_weight_grad, {"kernel_size": (3, 2)}, r"grad must have shape \(2, 3, 8, 4, 4\), got \(2, 3, 8, 4, 3\)"),
    (conv2d_weight_grad, {"kernel_size": 0}, r"kernel_size must be at least 1, got 0"),
    (conv2d_weight_grad, {"grad": GRAD[:, :1]}, r"grad must have shape \(2, 3, 8, 4, 3\), got \(2, 1, 8, 4, 3\)"),
    (
        conv2d_weight_grad,
        {"grad": GRAD[0]},
        r"grad must have shape \(M=2, N, C_out, H_out, W_out\), got \(3, 8, 4, 3\)",
    ),
    (conv2d_weight_grad, {"grad": GRAD[:1]}, r"grad must have shape \(M=2, N, .*, got \(1, 3, 8, 4, 3\)"),
    (conv2d_weight_grad, {"x": X[0, 0]}, r"x must have shape .*, got \(4, 6, 5\)"),
]


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__name__)
@pytest.mark.parametrize(("wrong", "message"), SETTINGS, ids=[str(wrong) for wrong, _ in SETTINGS])
def test_conv2d_refuses_settings(function, wrong, message):
    with pytest.raises(ValueError, match=rf"^{function.__name__}: {message}$"):
        function(**(ARGUMENTS[function] | wrong))


@pytest.mark.parametrize(("function", "wrong", "message"), SHAPES, ids=[message for *_, message in SHAPES])
def test_conv2d_refuses_shapes(function, wrong, message):
    with pytest.raises(ValueError, match=rf"^{function.__name__}: {message}$"):
        function(**(ARGUMENTS[function] | wrong))


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__name__)
def test_conv2d_refuses_kinds(function):
    (first, tensor), (second, other), *rest = ARGUMENTS[function].items()
    name = function.__name__
    for wrong in (first, second):
        tensors = {first: tensor, second: other, wrong: ARGUMENTS[function][wrong].int()}
        with pytest.raises(TypeError, match=rf"^{name}: {wrong} must be a floating-point tensor, got torch\.int32$"):
            function(**tensors, **dict(rest))
    wanted, got = (re.escape(f"({dtype}, {tensor.device})") for dtype in (torch.float64, torch.float32))
    with pytest.raises(
        TypeError, match=rf"^{name}: {first} must have {second}'s dtype and device {wanted}, got {got}$"
    ):
        function(tensor, other.double(), **dict(rest))
    with pytest.raises(TypeError, match=rf"must have {second}'s dtype and device \(torch\.float32, meta\)"):
        function(tensor, other.to("meta"), **dict(rest))


def test_conv2d_autocast_refuses_integers():
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(TypeError, match=r"^conv2d: x must be a floating-point tensor, got torch\.int32$"),
    ):
        conv2d(X.int(), WEIGHT)
