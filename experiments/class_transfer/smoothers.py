"""Choices of the smooth part R that are not learnt: a Gaussian, total-variation flow, anisotropic diffusion.

Each maps images ``(N, 3, H, W)`` to R, or to R and bands that sum to the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from experiments.class_transfer.diffusion import LearntDiffusion
from experiments.class_transfer.flow import Bands, split_by_flow
from experiments.common.gaussian import gaussian_smooth

SMOOTHERS = ("gaussian", "learnt", "tv", "anisotropic")
_RELATIVE_WIDTH = 1 / 16  # of the Gaussian, and of what the other flows remove, in image heights
_EDGE_QUANTILE = 0.9
_LEAST_ITERATIONS = 40  # of a step of the total-variation flow; flat regions need more, the larger the image is
_LARGEST_EXPLICIT_STEP = 0.2  # below 1/4, the limit of stability for four neighbours


class GaussianSmoother(nn.Module):
    """R is the image after a Gaussian; there are no bands.

    Args:
        sigma: Standard deviation in pixels.
    """

    splits = False

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """Smooth images ``(N, 3, H, W)``."""
        return gaussian_smooth(x, self.sigma)


class FlowSmoother(nn.Module):
    """A flow without parameters, split as the learnt one is.

    Args:
        steps: Number of bands.
        time: Length of the flow.
    """

    splits = True

    def __init__(self, steps: int, time: float) -> None:
        super().__init__()
        self.steps, self.time = steps, time

    def forward(self, x: Tensor) -> Bands:
        """Split images ``(N, C, H, W)``; no gradient flows to them."""
        with torch.no_grad():
            return split_by_flow(x, self.start(), steps=self.steps, time=self.time)

    def start(self) -> nn.Module:
        """Make the velocity of a new flow."""
        raise NotImplementedError


class TotalVariationFlow(FlowSmoother):
    r"""Total-variation flow, :math:`u_t = \mathrm{div}(\nabla u / |\nabla u|)`, the gradient jointly of all channels.

    Time is in pixels times grey value: a disc of radius r loses 2 / r of its height in a unit of time. Each step is
    implicit, its dual problem solved by a fixed number of iterations that begin where the step before ended.

    Args:
        steps: Number of bands.
        time: Length of the flow.
        iterations: Of the dual problem of each step.

    Source: Chambolle (2004), An algorithm for total variation minimization and applications; accelerated as in Beck &
    Teboulle (2009), Fast gradient-based algorithms for constrained total variation image denoising.
    """

    def __init__(self, steps: int, time: float, iterations: int) -> None:
        super().__init__(steps, time)
        self.iterations = iterations

    def start(self) -> nn.Module:
        """Make the velocity of a new flow."""
        return _ImplicitTotalVariation(self.time / self.steps, self.iterations)


class _ImplicitTotalVariation(nn.Module):
    def __init__(self, step: float, iterations: int) -> None:
        super().__init__()
        self.step, self.iterations = step, iterations
        self.dual: Tensor | None = None

    def forward(self, u: Tensor) -> Tensor:
        """Return (u - v) / h with v the proximal point of h TV at u: minus the divergence of the dual field."""
        before = point = torch.zeros_like(u).expand(2, *u.shape) if self.dual is None else self.dual
        momentum = 1.0
        for _ in range(self.iterations):
            ascent = point + _gradient(u + self.step * _divergence(point)) / (8 * self.step)
            length = ascent.square().sum((0, 2), keepdim=True).sqrt()
            dual = ascent / length.clamp(min=1)
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            point = dual + (momentum - 1) / following * (dual - before)
            before, momentum = dual, following
        self.dual = before
        return -_divergence(before)


class AnisotropicDiffusion(FlowSmoother):
    r"""Diffusion that stops at edges, :math:`u_t = \mathrm{div}(g \nabla u)`.

    The conductance is :math:`g = 1 / (1 + |\nabla u|^2 / \lambda^2)`; its gradient is joint over the channels and of a
    slightly smoothed image. It adapts: lambda is the 90 % quantile of each image's own gradients, found anew at every
    step.

    Args:
        steps: Number of bands.
        time: Length of the flow; without edges it smooths as a Gaussian of deviation sqrt(2 time) pixels.

    Source: Perona & Malik (1990), Scale-space and edge detection using anisotropic diffusion; smoothed gradient: Catte
    et al. (1992), Image selective smoothing and edge detection by nonlinear diffusion.
    """

    def start(self) -> nn.Module:
        """Make the velocity of a new flow."""
        return _EdgeStopping(self.time / self.steps)


class _EdgeStopping(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        self.parts = math.ceil(step / _LARGEST_EXPLICIT_STEP)

    def forward(self, u: Tensor) -> Tensor:
        """Return (u - v) / h with v what small explicit steps make of u in the time h."""
        v = u
        for _ in range(self.parts):
            v = v + self.step / self.parts * _divergence(_conductance(v) * _gradient(v))
        return (u - v) / self.step


def _conductance(u: Tensor) -> Tensor:
    """How freely each pixel passes its difference on, 0 to 1, shape ``(1, N, 1, H, W)``."""
    squared = _gradient(gaussian_smooth(u, 1.0)).square().sum((0, 2), keepdim=True)
    values = squared.flatten(3)
    edge = values.kthvalue(math.ceil(_EDGE_QUANTILE * values.shape[-1]), dim=-1, keepdim=True).values[..., None]
    return 1 / (1 + squared / edge.clamp(min=torch.finfo(u.dtype).tiny))


def _gradient(u: Tensor) -> Tensor:
    """Forward differences down and to the right, 0 beyond the border; shape ``(2, *u.shape)``."""
    down = nn.functional.pad(u[..., 1:, :] - u[..., :-1, :], (0, 0, 0, 1))
    right = nn.functional.pad(u[..., :, 1:] - u[..., :, :-1], (0, 1))
    return torch.stack([down, right])


def _divergence(field: Tensor) -> Tensor:
    """Minus the adjoint of :func:`_gradient`."""
    down, right = field[0][..., :-1, :], field[1][..., :, :-1]
    return (
        nn.functional.pad(down, (0, 0, 0, 1))
        - nn.functional.pad(down, (0, 0, 1, 0))
        + nn.functional.pad(right, (0, 1))
        - nn.functional.pad(right, (1, 0))
    )


def make_smoother(
    name: str, *, image_size: int, bands: int, sigma: float | None = None, velocity: str = "spatial"
) -> nn.Module:
    """Make the smoother of a name.

    Args:
        name: Of :data:`SMOOTHERS`.
        image_size: Height and width of the images, in pixels.
        bands: Number of bands of those that split the image.
        sigma: Width of what is smoothed away, in pixels, of those that are not learnt; a 16th of the image by default.
            The Gaussian's deviation, the total-variation flow's time, and the deviation without edges of the
            anisotropic diffusion.
        velocity: Network of the learnt one.

    Returns:
        A module that maps images to R, or to R and bands where its ``splits`` is true.

    Raises:
        ValueError: If there is no such smoother.
    """
    sigma = image_size * _RELATIVE_WIDTH if sigma is None else sigma
    if name == "gaussian":
        return GaussianSmoother(sigma)
    if name == "learnt":
        return LearntDiffusion(velocity, bands)
    if name == "tv":
        return TotalVariationFlow(bands, sigma, image_size + _LEAST_ITERATIONS)
    if name == "anisotropic":
        return AnisotropicDiffusion(bands, sigma**2 / 2)
    raise ValueError(f"make_smoother: name must be one of {', '.join(SMOOTHERS)}, got {name!r}")
