"""Gaussian smoothing of batches of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def gaussian_smooth(images: Tensor, sigma: float) -> Tensor:
    """Convolve every plane with a Gaussian: separable, radius ⌈3 sigma⌉, reflected at the borders.

    Equivalent to ``scipy.ndimage.gaussian_filter(..., mode="mirror", radius=ceil(3 * sigma))``.

    Args:
        images: Shape ``(..., H, W)``, floating.
        sigma: Standard deviation in pixels, above 0; the radius must be below H and W.

    Returns:
        Shape and dtype as ``images``.

    Raises:
        ValueError: If sigma is not above 0 or too large for the images.
    """
    *batch, height, width = images.shape
    radius = math.ceil(3 * sigma) if sigma > 0 else 0
    if not 0 < radius < min(height, width):
        raise ValueError(
            f"gaussian_smooth: sigma must be above 0 and 3 sigma below {height} and {width} pixels, got {sigma}"
        )
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    planes = nn.functional.pad(images.reshape(-1, 1, height, width), [radius] * 4, mode="reflect")
    planes = nn.functional.conv2d(planes, kernel.view(1, 1, -1, 1))
    planes = nn.functional.conv2d(planes, kernel.view(1, 1, 1, -1))
    return planes.reshape(*batch, height, width)
