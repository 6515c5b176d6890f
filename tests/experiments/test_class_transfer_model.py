"""Generator, discriminator and decomposer: sizes, what fusing keeps, and the identities of the decomposition."""

import pytest
import torch
from torch import nn

import bsfast
from experiments.class_transfer import discriminator, generator
from experiments.class_transfer.decomposer import Decomposer, decompose_all, magnified, subset_sum
from experiments.class_transfer.discriminator import Discriminator
from experiments.class_transfer.generator import AdaptiveInstanceNorm, ResBlock, make_branch
from experiments.class_transfer.smoothers import SMOOTHERS, make_smoother


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def unsettle(module):
    """Give zero parameters values, so that every parameter matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make_decomposer(smoother, branches=4, dtype=torch.float32, inputs=None):
    net = bsfast.fuse([unsettle(make_branch(32, 3, (2, 4))) for _ in range(branches)])
    own = make_smoother(smoother, image_size=32, bands=branches)
    inputs = inputs or ("bands" if own.splits else "image")
    return Decomposer(net, own, 3, inputs).to(dtype)


@pytest.mark.parametrize(
    ("size", "widths", "parameters"),
    [
        (256, (8, 64), 527_043),
        (256, (16, 128), 2_094_723),
        (256, (21, 171), 3_742_896),
        (256, (32, 256), 8_352_003),
        (128, (8, 64), 378_051),
        (128, (16, 128), 1_501_827),
        (128, (32, 256), 5_986_563),
        (64, (8, 64), 94_883),
        (64, (16, 128), 374_339),
        (64, (32, 256), 1_486_979),
        (32, (4, 16), 6_187),
        (32, (8, 32), 23_443),
        (32, (16, 64), 91_171),
    ],
)
def test_make_branch_has_the_specified_parameters(size, widths, parameters):
    assert count(make_branch(size, 3, widths)) == parameters


@pytest.mark.parametrize(("size", "parameters"), [(32, 23_443), (64, 94_883), (128, 1_501_827), (256, 2_094_723)])
def test_make_branch_presets(size, parameters):
    assert count(make_branch(size, 3)) == parameters
    assert generator.SMALLEST == (4, 16)


def test_originals_have_the_published_parameters():
    assert count(make_branch(256, 64, (64, 512))) == 33_892_995
    assert count(Discriminator(256, 2, 64, 512)) == 20_852_290
    assert count(Discriminator(256, 3, 64, 512)) == 20_852_803


@pytest.mark.parametrize(("size", "parameters"), [(32, 419_347), (64, 2_854_947), (128, 4_035_107), (256, 5_215_267)])
def test_discriminator_presets(size, parameters):
    assert count(Discriminator(size, 3, *discriminator.WIDTHS[size])) == parameters


def test_make_branch_ignores_the_class_at_the_start():
    branch, x = make_branch(32, 3, (4, 16)), torch.randn(2, 3, 32, 32)
    outputs = [branch(x, torch.eye(3)[[label] * 2]) for label in range(3)]
    assert torch.equal(outputs[0], outputs[1])
    biases = [p for name, p in branch.named_parameters() if name.endswith("bias") and "norm" not in name]
    assert all((bias == 0).all() for bias in biases)
    unsettle(branch)
    assert not torch.equal(branch(x, torch.eye(3)[[0, 0]]), branch(x, torch.eye(3)[[1, 1]]))


def test_make_branch_scales_its_output():
    torch.manual_seed(1)
    one = make_branch(32, 3, (4, 16))
    torch.manual_seed(1)
    third = make_branch(32, 3, (4, 16), output_scale=1 / 3)
    x, style = torch.randn(2, 3, 32, 32), torch.eye(3)[[0, 1]]
    torch.testing.assert_close(3 * third(x, style), one(x, style))


def test_weights_have_the_variance_of_he():
    weights = [layer.weight for layer in Discriminator(32, 3, 64, 256).modules() if isinstance(layer, nn.Conv2d)]
    for weight in weights:
        fan_in = weight[0].numel()
        if weight.numel() > 2000:
            torch.testing.assert_close(weight.var().item(), 2 / fan_in, rtol=0.1, atol=0)


def test_res_block_equals_the_shortcut_at_full_resolution():
    block, x = ResBlock(3, 5, down=True).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = block.pool(block.conv1(block.activation(block.norm1(x))))
    y = block.conv2(block.activation(block.norm2(y)))
    expected = (y + block.pool(block.shortcut(x))) / 2**0.5
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-14)


def test_adaptive_instance_norm_sets_mean_and_deviation():
    layer = unsettle(AdaptiveInstanceNorm(3, 4)).double()
    style = torch.eye(3, dtype=torch.float64)[[0, 2]]
    y = layer(5 + 2 * torch.randn(2, 4, 16, 16, dtype=torch.float64), style)
    gamma, beta = layer.linear(style).chunk(2, dim=1)
    torch.testing.assert_close(y.mean((2, 3)), beta)
    torch.testing.assert_close(y.var((2, 3), correction=0).sqrt(), (1 + gamma).abs(), rtol=1e-4, atol=0)


def test_discriminator_takes_the_logit_of_the_class():
    net, x = Discriminator(32, 3, 2, 4), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(net(x, torch.tensor([2, 0, 1])), net.layers(x)[[0, 1, 2], [2, 0, 1]])


@pytest.mark.parametrize("per_branch", [False, True])
def test_fused_branches_equal_a_loop(per_branch):
    # In float32 a LeakyReLU's input near 0 may change its sign, and with it the gradient.
    branches = [unsettle(make_branch(64, 3, (2, 8))).double() for _ in range(3)]
    net = bsfast.fuse(branches)
    x = torch.randn(*([3] if per_branch else []), 2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    style = torch.eye(3, dtype=torch.float64)[[2, 0]]
    expected = torch.stack([branch(x[k] if per_branch else x, style) for k, branch in enumerate(branches)])
    actual = net.branch_outputs(x, style, per_branch=(per_branch, False))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    weights = torch.randn_like(expected)
    (grad,) = torch.autograd.grad((actual * weights).sum(), x)
    (grad_expected,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(grad, grad_expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("smoother", SMOOTHERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_decompose_sums_to_the_output(smoother, dtype, tolerance):
    decomposer = make_decomposer(smoother, dtype=dtype)
    x, target = torch.rand(3, 3, 32, 32, dtype=dtype) * 2 - 1, torch.tensor([0, 1, 2])
    with torch.no_grad():
        parts, f = decomposer.decompose(x, target), decomposer(x, target)
    scale = max(1.0, parts.v.abs().max().item())
    assert parts.v.shape == (4, 3, 3, 32, 32)
    torch.testing.assert_close(parts.R + parts.v.sum(0), f, rtol=0, atol=scale * tolerance)
    torch.testing.assert_close(parts.f, f, rtol=0, atol=scale * tolerance)
    if parts.phi is not None:
        torch.testing.assert_close(parts.R + parts.phi.sum(0), x, rtol=0, atol=tolerance)
    branches = bsfast.unfuse(decomposer.branches)
    for k, branch in enumerate(branches):  # branch k sees band k, or the image
        own = x if parts.phi is None else parts.phi[k]
        expected = branch(own, torch.eye(3, dtype=dtype)[target])
        torch.testing.assert_close(parts.v[k], expected, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_decomposer_with_identity_branches_is_the_identity():
    class Same(nn.Module):
        def forward(self, x, style):
            return x + 0 * style.sum()

    own = make_smoother("learnt", image_size=32, bands=5)
    decomposer = Decomposer(bsfast.fuse([Same() for _ in range(5)]), own, 2, "bands")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(decomposer(x, torch.tensor([0, 1])), x, rtol=0, atol=1e-5)


def test_magnified_is_affine_and_subsets_add_up():
    decomposer = make_decomposer("learnt", dtype=torch.float64)
    x, target = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1])
    with torch.no_grad():
        parts = decomposer.decompose(x, target)
    assert torch.equal(magnified(parts, 2, 1.0), parts.f)
    others = parts.R + parts.v[[0, 1, 3]].sum(0)
    for alpha in (-1.0, 0.0, 2.0, 3.0):
        torch.testing.assert_close(magnified(parts, 2, alpha), others + alpha * parts.v[2], rtol=0, atol=1e-12)
    total = parts.R + subset_sum(parts, [0, 3]) + subset_sum(parts, [2]) + subset_sum(parts, [1])
    torch.testing.assert_close(total, parts.f, rtol=0, atol=1e-12)


def test_decompose_under_autocast_stays_exact_where_it_must():
    decomposer = make_decomposer("learnt")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        parts = decomposer.decompose(x, torch.tensor([0, 1]))
        R, _ = make_decomposer("gaussian").split(x)
    torch.testing.assert_close(parts.R + parts.phi.sum(0), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.R + parts.v.sum(0), parts.f, rtol=0, atol=1e-5)
    assert R.dtype == torch.float32
    assert torch.equal(R, make_decomposer("gaussian").split(x)[0])


def test_decompose_all_equals_one_batch():
    decomposer = make_decomposer("learnt", dtype=torch.float64)
    x, target = torch.rand(5, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        expected = decomposer.decompose(x, target)
    for actual, own in zip(decompose_all(decomposer, x, target, batch_size=2), expected, strict=True):
        torch.testing.assert_close(actual, own, rtol=1e-6, atol=1e-8)
    assert decompose_all(make_decomposer("gaussian", dtype=torch.float64), x, target).phi is None


def test_gradients_reach_every_parameter_of_every_branch_and_the_smoother():
    decomposer = make_decomposer("learnt")
    decomposer(torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])).square().mean().backward()
    for name, parameter in decomposer.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        # A bias before instance normalisation has no influence.
        if "from_rgb.bias" not in name and "conv1.bias" not in name:
            per_branch = grad.flatten(1).abs().amax(1) if name.startswith("branches") else grad.abs().max()
            assert (per_branch > 0).all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((48, 3, (4, 8)), "image_size must be a power of 2 from 32, got 48"),
        ((16, 3, (4, 8)), "image_size must be a power of 2 from 32, got 16"),
        ((512, 3), "widths must be given for images of 512 pixels, got None"),
        ((32, 3, (8, 4)), "widths must be 1 <= base <= most and num_classes at least 1, got 8, 4 and 3"),
        ((32, 0, (4, 8)), "got 4, 8 and 0"),
    ],
)
def test_make_branch_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_branch(*arguments)


def test_decomposer_refuses():
    net = bsfast.fuse([make_branch(32, 3, (2, 4)) for _ in range(2)])
    with pytest.raises(ValueError, match="inputs must be one of image, bands, got 'both'"):
        Decomposer(net, make_smoother("gaussian", image_size=32, bands=2), 3, "both")
    for smoother in (make_smoother("gaussian", image_size=32, bands=2), make_smoother("tv", image_size=32, bands=3)):
        with pytest.raises(ValueError, match=r"the smoother must make a band for each of 2 branches, got [03]"):
            Decomposer(net, smoother, 3, "bands")
