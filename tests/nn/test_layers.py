"""Each branched layer against the ``torch.nn`` module of every branch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast.nn as bnn
from bsfast.layout import to_batch_last
from bsfast.nn import functional

# Relative L2 error of one op in float32: a few roundoffs (6e-8) times the square root of the longest sum (under 2000).
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

Layer = tuple[type[bnn.StackedModule], Callable[[], nn.Module], tuple[int, ...]]
LAYERS: dict[str, Layer] = {
    "conv": (bnn.Conv2d, lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 7, 5)),
    "conv-stride-groups": (bnn.Conv2d, lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), (4, 7, 5)),
    "conv-dilated-same": (bnn.Conv2d, lambda: nn.Conv2d(3, 2, (3, 5), dilation=(2, 1), padding="same"), (3, 7, 5)),
    "conv-circular": (bnn.Conv2d, lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), (3, 7, 5)),
    "conv-reflect": (bnn.Conv2d, lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 7, 5)),
    "linear": (bnn.Linear, lambda: nn.Linear(5, 4), (5,)),
    "linear-sequence": (bnn.Linear, lambda: nn.Linear(5, 4, bias=False), (3, 2, 5)),
    "batchnorm1d": (bnn.BatchNorm, lambda: nn.BatchNorm1d(5), (5,)),
    "batchnorm1d-sequence": (bnn.BatchNorm, lambda: nn.BatchNorm1d(5, eps=1e-2), (5, 3)),
    "batchnorm2d": (bnn.BatchNorm, lambda: nn.BatchNorm2d(3, momentum=0.3), (3, 7, 5)),
    "batchnorm2d-cumulative": (bnn.BatchNorm, lambda: nn.BatchNorm2d(3, momentum=None), (3, 7, 5)),
    "batchnorm2d-plain": (bnn.BatchNorm, lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False), (3, 4, 5)),
    "batchnorm3d": (bnn.BatchNorm, lambda: nn.BatchNorm3d(3), (3, 2, 3, 4)),
    "instancenorm": (bnn.InstanceNorm2d, lambda: nn.InstanceNorm2d(3), (3, 7, 5)),
    "instancenorm-all": (
        bnn.InstanceNorm2d,
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (3, 7, 5),
    ),
    "groupnorm": (bnn.GroupNorm, lambda: nn.GroupNorm(2, 4), (4, 7, 5)),
    "groupnorm-flat": (bnn.GroupNorm, lambda: nn.GroupNorm(2, 4, affine=False), (4,)),
    "layernorm": (bnn.LayerNorm, lambda: nn.LayerNorm((7, 5)), (3, 7, 5)),
    "layernorm-flat": (bnn.LayerNorm, lambda: nn.LayerNorm(5, elementwise_affine=False), (5,)),
    "prelu": (bnn.PReLU, nn.PReLU, (3, 7, 5)),
    "prelu-channels": (bnn.PReLU, lambda: nn.PReLU(3), (3, 7, 5)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str, num_branches: int, dtype: torch.dtype) -> tuple[bnn.StackedModule, list[nn.Module]]:
    cls, build, _ = LAYERS[name]
    branches = [build().to(dtype) for _ in range(num_branches)]
    for branch in branches:
        for parameter in branch.parameters():
            nn.init.normal_(parameter)
    return cls.from_branches(branches), branches


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert (got - want).norm() <= TOLERANCE[want.dtype] * want.norm().clamp(min=1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_branches", [1, 3])
@pytest.mark.parametrize("samples", [2, 17])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_its_branches(name: str, samples: int, num_branches: int, dtype: torch.dtype) -> None:
    layer, branches = make(name, num_branches, dtype)
    for training in (True, False):
        layer.train(training)
        x = torch.randn(num_branches, samples, *LAYERS[name][2], dtype=dtype)
        x = (to_batch_last(x) if x.dim() == 5 and samples > 16 else x).requires_grad_()
        own = x.detach().clone().requires_grad_()
        got = layer(x)
        want = torch.stack([branch.train(training)(own[k]) for k, branch in enumerate(branches)])
        assert_near(got, want)
        cotangent = torch.randn_like(want)
        layer.zero_grad()
        got.backward(cotangent)
        for branch in branches:
            branch.zero_grad()
        want.backward(cotangent)
        assert_near(x.grad, own.grad)
        for key, parameter in layer.named_parameters():
            assert_near(parameter.grad, torch.stack([branch.get_parameter(key).grad for branch in branches]))
        for key, buffer in layer.named_buffers():
            torch.testing.assert_close(buffer, torch.stack([branch.get_buffer(key) for branch in branches]))


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name][0].takes_shared])
def test_layer_equals_its_branches_on_a_shared_input(name: str) -> None:
    layer, branches = make(name, 3, torch.float64)
    for samples in (2, 17):
        x = torch.randn(samples, *LAYERS[name][2], dtype=torch.float64)
        assert_near(layer(x, shared=True), torch.stack([branch(x) for branch in branches]))


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith(("conv", "instance", "linear"))])
def test_layer_takes_one_sample_without_an_axis(name: str) -> None:
    layer, branches = make(name, 3, torch.float64)
    x = torch.randn(3, *LAYERS[name][2], dtype=torch.float64)
    assert_near(layer(x), torch.stack([branch(own) for branch, own in zip(branches, x, strict=True)]))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_convolution_pads_one_shared_sample_without_an_axis(mode: str) -> None:
    branches = [nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode) for _ in range(2)]
    x = torch.randn(3, 7, 5)
    got = bnn.Conv2d.from_branches(branches)(x, shared=True)
    assert_near(got, torch.stack([branch(x) for branch in branches]))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients_are_derivatives(name: str) -> None:
    layer, _ = make(name, 2, torch.float64)
    names = [key for key, _ in layer.named_parameters()]
    x = torch.randn(2, 2, *LAYERS[name][2], dtype=torch.float64)[..., :3, :3] if x_is_image(name) else None
    x = torch.randn(2, 3, *LAYERS[name][2], dtype=torch.float64) if x is None or "layernorm" in name else x
    layer.eval() if "stats" in name else layer.train()

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        buffers = {key: buffer.clone() for key, buffer in layer.named_buffers()}
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)) | buffers, (x,))
        return result

    inputs = [x.requires_grad_(), *(parameter.detach().clone().requires_grad_() for parameter in layer.parameters())]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def x_is_image(name: str) -> bool:
    return len(LAYERS[name][2]) == 3 and "linear" not in name


@pytest.mark.parametrize("name", LAYERS)
def test_to_branches_is_bit_for_bit(name: str) -> None:
    layer, branches = make(name, 3, torch.float32)
    for ours, theirs in zip(layer.to_branches(), branches, strict=True):
        assert str(ours) == str(theirs)
        for (key, tensor), (other, expected) in zip(
            ours.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            assert key == other
            assert torch.equal(tensor, expected)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty": (
        lambda: bnn.Linear.from_branches([]),
        ValueError,
        "Linear.from_branches: branches must hold at least one",
    ),
    "conv-rank": (
        lambda: functional.conv2d(torch.ones(2, 3, 4, 5, 6, 7), torch.ones(2, 3, 4, 3, 3)),
        ValueError,
        r"conv2d: x must have shape \(N, C_in, H, W\) or \(C_in, H, W\) after the branch axis, got",
    ),
    "conv-same-stride": (
        lambda: functional.conv2d(torch.ones(2, 1, 4, 5, 6), torch.ones(2, 3, 4, 3, 3), stride=2, padding="same"),
        ValueError,
        "conv2d: padding must be 'valid', 'same' with stride 1",
    ),
    "linear-width": (
        lambda: functional.linear(torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
        ValueError,
        "linear: x must have in_features=5 on its last axis",
    ),
    "linear-dtype": (
        lambda: functional.linear(torch.ones(2, 3, 5).double(), torch.ones(2, 3, 5)),
        TypeError,
        "linear: x must have weight's dtype torch.float32, got torch.float64",
    ),
    "batchnorm-channels": (
        lambda: functional.batch_norm(torch.ones(2, 3, 4), None, None, torch.ones(2, 5), training=True),
        ValueError,
        "batch_norm: x must have C=5 channels",
    ),
    "batchnorm-channels-of-statistics": (
        lambda: functional.batch_norm(torch.ones(2, 3, 4), torch.ones(2, 5), torch.ones(2, 5)),
        ValueError,
        "batch_norm: x must have C=5 channels",
    ),
    "instancenorm-stats": (
        lambda: functional.instance_norm(torch.ones(2, 3, 4, 5, 6), use_input_stats=False),
        ValueError,
        "instance_norm: running statistics must be given",
    ),
    "layernorm-rank": (
        lambda: functional.layer_norm(torch.ones(2, 3), (2, 3)),
        ValueError,
        "layer_norm: x must have 2 axes after M",
    ),
    "prelu-channels": (
        lambda: functional.prelu(torch.ones(2, 3, 1, 4), torch.ones(2, 5)),
        ValueError,
        r"x must have C=5 channels on axis 2 of \(M, N, C, ...\), got \(2, 3, 1, 4\)",
    ),
    "prelu-dtype": (
        lambda: functional.prelu(torch.ones(2, 3, 1).double(), torch.ones(2, 1)),
        TypeError,
        "x must have weight's dtype torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_layer_refuses(name: str) -> None:
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_instance_norm_by_running_statistics() -> None:
    x, mean, var = torch.randn(2, 3, 4, 5, 5).double(), torch.randn(2, 4).double(), torch.rand(2, 4).double() + 1
    got = functional.instance_norm(x, mean, var, use_input_stats=False)
    want = torch.stack([nn.functional.instance_norm(x[k], mean[k], var[k], use_input_stats=False) for k in range(2)])
    assert_near(got, want)


def test_embedding_keeps_the_padding_row() -> None:
    weight, x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.randint(5, (2, 7))
    functional.embedding(x, weight, padding_idx=-1).sin().sum().backward()
    own = weight.detach().clone().requires_grad_()
    torch.stack([nn.functional.embedding(x[k], own[k], padding_idx=-1) for k in range(2)]).sin().sum().backward()
    assert torch.equal(weight.grad, own.grad)
    assert weight.grad[:, -1].abs().max() == 0


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "make", [nn.BatchNorm1d, lambda c, momentum: nn.BatchNorm1d(c, momentum=momentum, affine=False)]
)
def test_batch_norm_that_stops_tracking_leaves_its_buffers(make: Callable[..., Any], momentum: float | None) -> None:
    branches = [make(3, momentum=momentum) for _ in range(2)]
    for branch in branches:
        branch(torch.randn(5, 3))
        branch.track_running_stats = False
    layer = bnn.BatchNorm.from_branches(branches)
    for training in (True, False):
        x = torch.randn(2, 5, 3)
        want = torch.stack([branch.train(training)(x[k]) for k, branch in enumerate(branches)])
        torch.testing.assert_close(layer.train(training)(x), want)
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, torch.stack([branch.get_buffer(name) for branch in branches]))


def test_prelu_takes_what_torch_takes() -> None:
    x = torch.randn(2, 4, 3)
    for weight in (torch.rand(2), torch.rand(2, 1), torch.rand(2, 3)):
        want = torch.stack([nn.functional.prelu(*own) for own in zip(x, weight, strict=True)])
        torch.testing.assert_close(functional.prelu(x, weight), want)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match=f"prelu: x must have weight's dtype torch.float32, got {dtype}"):
            functional.prelu(x.to(dtype), torch.rand(2, 1))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            want = torch.stack([nn.functional.prelu(own.to(dtype), torch.ones(1)) for own in x])
            got = functional.prelu(x.to(dtype), torch.ones(2, 1))
            torch.testing.assert_close(got, want)
        with pytest.raises(TypeError, match="prelu: x must have"):
            functional.prelu(x.double(), torch.ones(2, 1))
