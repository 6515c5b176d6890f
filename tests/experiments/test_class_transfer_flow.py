"""Smoothers: the split is exact for every velocity; closed forms of linear and total-variation flow."""

import math

import pytest
import torch
from scipy import ndimage
from torch import nn

from experiments.class_transfer import smoothers
from experiments.class_transfer.augment import to_signal
from experiments.class_transfer.diffusion import VELOCITIES, LearntDiffusion
from experiments.class_transfer.flow import split_by_flow
from experiments.class_transfer.measure import roughness
from experiments.class_transfer.smoothers import SMOOTHERS, TotalVariationFlow, make_smoother
from experiments.common.gaussian import gaussian_smooth
from experiments.common.synthetic.sets import render_layers


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def smooth_images(count=2, size=32, dtype=torch.float32):
    return gaussian_smooth(torch.randn(count, 3, size, size, dtype=dtype), 1.5).clamp(-1, 1)


class Changing(nn.Module):
    """A velocity that differs from step to step."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, u):
        self.calls += 1
        return torch.sin(self.calls * u) + torch.cos(u).square()


@pytest.mark.parametrize("steps", [1, 2, 9, 16])
@pytest.mark.parametrize("velocity", [torch.tanh, torch.sin, lambda u: u.roll(1, -1) * u, Changing()])
def test_split_by_flow_sums_to_the_image(steps, velocity):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    parts = split_by_flow(x, velocity, steps=steps, time=0.7)
    assert parts.phi.shape == (steps, 2, 3, 8, 8)
    close(parts.R + parts.phi.sum(0), x, 1e-12)


@pytest.mark.parametrize("q", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_split_by_flow_of_a_linear_velocity_has_negative_binomial_weights(q, steps):
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    parts = split_by_flow(x, lambda u: u * q * steps, steps=steps, time=1.0)
    for k in range(1, steps + 1):
        close(parts.phi[k - 1], k * q**2 * (1 - q) ** (k - 1) * x, 1e-14)
    close(parts.R, (1 - q) ** steps * (1 + steps * q) * x, 1e-14)


def test_split_by_flow_refuses():
    with pytest.raises(ValueError, match="steps must be at least 1 and time above 0, got 0 and 1"):
        split_by_flow(torch.zeros(1, 1, 4, 4), torch.sin, steps=0, time=1.0)


@pytest.mark.parametrize(("name", "parameters"), [("spatial", 40_464), ("channel", 40_539)])
def test_velocity_has_the_parameters_of_the_paper(name, parameters):
    velocity = VELOCITIES[name]()
    assert sum(parameter.numel() for parameter in velocity.parameters()) == parameters
    assert sum(isinstance(layer, nn.Conv2d) for layer in velocity) == 8
    assert velocity(torch.zeros(2, 3, 32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", list(VELOCITIES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_learnt_diffusion_sums_to_the_image(name, dtype, tolerance, scale):
    smoother = LearntDiffusion(name, 9).to(dtype)
    with torch.no_grad():
        for parameter in smoother.parameters():
            parameter.mul_(scale ** (1 / 8))
    x = smooth_images(dtype=dtype)
    parts = smoother(x)
    assert (parts.phi.abs().amax((1, 2, 3, 4)) > 0).all()
    close(parts.R + parts.phi.sum(0), x, tolerance * max(1.0, parts.phi.abs().max().item()))


def test_learnt_diffusion_sums_to_the_image_after_training():
    smoother, x = LearntDiffusion("spatial", 9), smooth_images()
    optimizer = torch.optim.Adam(smoother.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        parts = smoother(x)
        loss = (parts.R - gaussian_smooth(x, 2.0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(smoother.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    parts = smoother(x)
    close(parts.R + parts.phi.sum(0), x, 1e-5)
    exact = smoother.double()(x.double())
    close(exact.R + exact.phi.sum(0), x.double(), 1e-12)


def test_learnt_diffusion_sums_to_the_image_under_autocast():
    smoother, x = LearntDiffusion("spatial", 9), smooth_images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = smoother(x)
    assert parts.R.dtype == parts.phi.dtype == torch.float32
    close(parts.R + parts.phi.sum(0), x, 1e-5)


def test_spatial_velocity_is_positively_homogeneous():
    smoother, x = LearntDiffusion("spatial", 9).double(), smooth_images(dtype=torch.float64)
    one, three = smoother(x), smoother(3 * x)
    close(three.R, 3 * one.R, 1e-12)
    close(three.phi, 3 * one.phi, 1e-12)
    minus = smoother.velocity(-x)
    assert (minus + smoother.velocity(x)).abs().max() > 1e-3 * minus.abs().max()  # it is not linear


def test_learnt_diffusion_begins_near_the_image():
    x = smooth_images()
    R = LearntDiffusion("spatial", 9)(x).R
    assert (R - x).square().mean() < 0.1 * x.square().mean()


def test_learnt_diffusion_refuses():
    with pytest.raises(ValueError, match="velocity must be one of spatial, channel, got 'wide'"):
        LearntDiffusion("wide", 9)


@pytest.mark.parametrize("name", [name for name in SMOOTHERS if name != "gaussian"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_every_flow_sums_to_the_image(name, dtype, tolerance):
    smoother = make_smoother(name, image_size=32, bands=9).to(dtype)
    assert smoother.splits
    x = smooth_images(dtype=dtype)
    parts = smoother(x)
    assert parts.phi.shape == (9, *x.shape)
    close(parts.R + parts.phi.sum(0), x, tolerance)
    again = smoother(x)
    assert torch.equal(again.R, parts.R)


@pytest.mark.parametrize("name", ["gaussian", "tv", "anisotropic"])
def test_smoothers_smooth_and_keep_the_mean(name):
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    smoother = make_smoother(name, image_size=32, bands=9)
    R = smoother(x).R if smoother.splits else smoother(x)
    assert roughness(R, x) < 0.1
    # The Gaussian reflects at the border without repeating it, and so does not keep the mean exactly.
    close(R.mean((2, 3)), x.mean((2, 3)), 0.05 if name == "gaussian" else 1e-10)
    constant = torch.full((1, 3, 32, 32), 0.3, dtype=torch.float64)
    parts = smoother(constant)
    close(parts.R if smoother.splits else parts, constant, 1e-12)


def test_tv_flow_moves_an_edge_by_time_over_width():
    # Nothing flows through the border, so t / w flows off a bar of width w next to it, and onto the ground as much.
    width, ground, time = 8, 24, 1.6
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    x[..., :width] = 1.0
    smoother = TotalVariationFlow(4, time, iterations=1000)
    parts = smoother(x)
    # The heights are linear in time before they meet: no second difference, no band, and R is the image.
    close(parts.phi, torch.zeros_like(parts.phi), 2e-3)
    velocity = smoother.start()
    u = x - velocity.step * velocity(x)
    fallen = velocity.step / width
    close(u[..., :width], torch.full((1, 1, 32, width), 1 - fallen, dtype=torch.float64), 1e-3)
    close(u[..., width:], torch.full((1, 1, 32, ground), velocity.step / ground, dtype=torch.float64), 1e-3)


def test_tv_flow_puts_a_bar_into_the_band_of_its_width():
    # Bars of height c, width w and period 2 w stay bars, lowered by 2 t / w and raised around as much: gone at c w / 4.
    heights = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    heights[..., 4:8] = heights[..., 12:16] = heights[..., 20:24] = heights[..., 28:32] = 1.0
    smoother = make_smoother("tv", image_size=32, bands=8, sigma=4.0)
    parts = smoother(heights)
    energy = parts.phi.square().sum((1, 2, 3, 4))
    gone = 4 / 4 / 2 * torch.tensor([1.0, 2.0])  # inner bars; those at the border take longer
    band = int(energy.argmax()) + 1
    assert gone[0] <= band * smoother.time / 8 <= gone[1] + smoother.time / 8


def test_tv_flow_is_near_the_converged_one():
    x = to_signal(render_layers("SynthAnimals", 3, 32).images).double()
    few = make_smoother("tv", image_size=32, bands=9)(x)
    many = TotalVariationFlow(9, 2.0, iterations=1000)(x)
    assert (few.R - many.R).norm() < 0.04 * x.norm()
    assert (few.phi[0] - many.phi[0]).norm() < 0.04 * many.phi[0].norm()
    assert (few.phi[-1] - many.phi[-1]).norm() < 0.3 * many.phi[-1].norm()


def test_gaussian_smooth_equals_scipy():
    x = torch.randn(2, 3, 20, 24, dtype=torch.float64)
    for sigma in (0.7, 2.0):
        expected = ndimage.gaussian_filter(
            x.numpy(), (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, *[math.ceil(3 * sigma)] * 2)
        )
        close(gaussian_smooth(x, sigma), torch.from_numpy(expected), 1e-12)
    with pytest.raises(ValueError, match="sigma must be above 0 and 3 sigma below 20 and 24 pixels, got 7"):
        gaussian_smooth(x, 7.0)
    with pytest.raises(ValueError, match="got 0"):
        gaussian_smooth(x, 0.0)


def test_anisotropic_diffusion_keeps_an_edge_that_a_gaussian_blurs():
    step = torch.zeros(1, 3, 32, 32)
    step[..., 16:] = 1.0
    noisy = step + 0.05 * torch.randn_like(step)
    edge = {}
    for name in ("gaussian", "anisotropic"):
        smoother = make_smoother(name, image_size=32, bands=9)
        R = smoother(noisy).R if smoother.splits else smoother(noisy)
        edge[name] = (R[..., 18] - R[..., 13]).mean().item()
    assert edge["anisotropic"] > 0.8 > edge["gaussian"]


def test_anisotropic_diffusion_adapts_to_each_image():
    x = smooth_images()
    conductance = smoothers._conductance(torch.cat([x, 7 * x]))
    assert conductance.shape == (1, 4, 1, 32, 32)
    share = (conductance < 0.5).float().mean((0, 2, 3, 4))  # beyond the 90 % quantile of the gradient
    close(share, torch.full((4,), 0.1), 0.002)
    smoother = make_smoother("anisotropic", image_size=32, bands=9).double()
    close(smoother(7 * x.double()).R, 7 * smoother(x.double()).R, 1e-12)


def test_make_smoother_refuses():
    with pytest.raises(ValueError, match="name must be one of gaussian, learnt, tv, anisotropic, got 'median'"):
        make_smoother("median", image_size=32, bands=9)
