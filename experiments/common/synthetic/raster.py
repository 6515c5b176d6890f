"""Shapes and textures on batches of images: signed distances, anti-aliased coverage, strands, seeded noise.

Coordinates run from -1 to 1 over the image, x to the right and y down. A parameter is a tensor of shape ``(N, 1, 1)``
or a number, a field a tensor of shape ``(N, H, W)``, and a signed distance is negative inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from experiments.common.gaussian import gaussian_smooth

Parameter = Tensor | float
_MOST_PARAMETERS = 160


class Draws:
    """The random numbers of a batch; those of one image depend on the seed and its index only.

    Args:
        seed: Seed of the set.
        indices: Index of each image in the set.
        size: Height and width of the noise, in pixels.
        planes: Number of noise fields an image.
    """

    def __init__(self, seed: int, indices: Sequence[int], size: int, planes: int) -> None:
        generators = [np.random.Generator(np.random.Philox(key=[seed, index])) for index in indices]
        numbers = np.stack([generator.random(_MOST_PARAMETERS, dtype=np.float32) for generator in generators])
        noise = [generator.standard_normal((planes, size, size), dtype=np.float32) for generator in generators]
        self._numbers = iter(torch.from_numpy(numbers).T)
        self._noise = iter(torch.from_numpy(np.stack(noise)).transpose(0, 1))

    def uniform(self, low: Parameter = 0.0, high: Parameter = 1.0) -> Tensor:
        """Draw a parameter, shape ``(N, 1, 1)``, uniform between two others."""
        return low + (high - low) * next(self._numbers).view(-1, 1, 1)

    def white(self) -> Tensor:
        """Take a field of white noise, shape ``(N, H, W)``, mean 0 and variance 1."""
        return next(self._noise)

    def smooth(self, scale: float) -> Tensor:
        """Take a field of Gaussian noise whose bumps are about ``scale`` wide, rescaled to variance 1."""
        return standardise(blur(self.white(), scale))


def grid(size: int) -> tuple[Tensor, Tensor]:
    """Coordinates x ``(1, 1, W)`` and y ``(1, H, 1)`` of the pixels' centres."""
    centres = (torch.arange(size) + 0.5) * (2 / size) - 1
    return centres.view(1, 1, -1), centres.view(1, -1, 1)


def turned(x: Tensor, y: Tensor, angle: Parameter) -> tuple[Tensor, Tensor]:
    """Coordinates in a frame that is turned by an angle in radians, clockwise as seen."""
    angle = torch.as_tensor(angle)
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def ellipse(x: Tensor, y: Tensor, half_width: Parameter, half_height: Parameter) -> Tensor:
    """Signed distance to an ellipse around the origin, exact to first order at its boundary."""
    a, b = x / half_width, y / half_height
    level = (a * a + b * b + 1e-12).sqrt()
    slope = ((a / half_width) ** 2 + (b / half_height) ** 2 + 1e-12).sqrt()
    return level * (level - 1) / slope


def triangle(x: Tensor, y: Tensor, half_width: Parameter, height: Parameter) -> Tensor:
    """Signed distance to the sides of a triangle that points up from its base, which lies at y = 0 and stays open."""
    steepness = half_width / height
    return ((x * x + 4e-4).sqrt() - half_width - y * steepness) / (1 + steepness**2) ** 0.5


def union(*distances: Tensor, smoothness: float = 0.05) -> Tensor:
    """Signed distance to a union whose inner corners are rounded."""
    return -smoothness * torch.logsumexp(torch.stack(torch.broadcast_tensors(*distances)) / -smoothness, dim=0)


def coverage(distance: Tensor, size: int, softness: float = 0.0) -> Tensor:
    """Share of each pixel that is inside, from the signed distance; ``softness`` widens the edge."""
    return (0.5 - distance / (2 / size + softness)).clamp(0, 1)


def stroke(distance: Tensor, width: Parameter, size: int) -> Tensor:
    """Coverage of a line from the unsigned distance to its middle; a line thinner than a pixel becomes fainter."""
    pixel = 2 / size
    width = torch.as_tensor(width)
    shown = width.clamp(min=pixel)
    return (0.5 - (distance - shown / 2) / pixel).clamp(0, 1) * (width / shown)


def bump(x: Tensor, y: Tensor, half_width: Parameter, half_height: Parameter) -> Tensor:
    """A Gaussian around the origin, 1 at its top."""
    return torch.exp(-((x / half_width) ** 2) - (y / half_height) ** 2)


def blur(field: Tensor, scale: float) -> Tensor:
    """Smooth a field by about a Gaussian of a standard deviation in coordinates, at least a third of a pixel."""
    size = field.shape[-1]
    sigma = max(scale * size / 2, 0.34)
    if sigma < 2.5:
        return gaussian_smooth(field, sigma)
    # A wide Gaussian at a lower resolution, interpolated, costs a fraction of it and serves random fields as well.
    factor = 2 ** min(math.floor(math.log2(sigma / 1.2)), int(math.log2(size)) - 3)
    small = nn.functional.avg_pool2d(field[:, None], factor)
    small = gaussian_smooth(small, sigma / factor)
    return nn.functional.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)[:, 0]


def standardise(field: Tensor) -> Tensor:
    """Give every image's field mean 0 and variance 1."""
    mean = field.mean((1, 2), keepdim=True)
    return (field - mean) / field.std((1, 2), keepdim=True).clamp(min=1e-6)


def strands(noise: Tensor, along_x: Tensor, along_y: Tensor, length: float) -> Tensor:
    """Smear noise along a direction field into strands, variance 1.

    Args:
        noise: Shape ``(N, H, W)``.
        along_x: Direction, shape ``(N, H, W)``; of any length.
        along_y: As ``along_x``.
        length: Of the strands, in coordinates.

    Returns:
        Shape ``(N, H, W)``.

    Source: Cabral & Leedom (1993), Imaging vector fields using line integral convolution, with straight lines.
    """
    count, size, _ = noise.shape
    reach = max(1, round(length * size / 4))
    norm = (along_x**2 + along_y**2 + 1e-8).sqrt()
    direction = torch.stack(torch.broadcast_tensors(along_x / norm, along_y / norm), dim=-1)
    x, y = grid(size)
    places = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    total = noise.clone()
    for step in range(1, reach + 1):
        weight = 0.5 + 0.5 * math.cos(math.pi * step / (reach + 1))
        for sign in (-1, 1):
            moved = places + sign * step * (2 / size) * direction
            smeared = nn.functional.grid_sample(
                noise[:, None], moved.expand(count, -1, -1, -1), padding_mode="reflection", align_corners=False
            )
            total += weight * smeared[:, 0]
    return standardise(total)


def lambert(height: Tensor, light_x: Parameter, light_y: Parameter) -> Tensor:
    """Cosine between the normal of a height field and a light that comes from the viewer's side, at least 0."""
    spacing = 2 / height.shape[-1]
    slope_y, slope_x = torch.gradient(height, spacing=spacing, dim=(1, 2))
    cosine = (1 - slope_x * light_x - slope_y * light_y) / (1 + slope_x**2 + slope_y**2).sqrt()
    return (cosine / (1 + torch.as_tensor(light_x) ** 2 + torch.as_tensor(light_y) ** 2).sqrt()).clamp(min=0)
