"""Random crops and flips of real images, as StarGAN v2 trains with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def augment(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Crop half of the images at random and flip half of them left to right.

    A crop covers 80 to 100 % of the area at an aspect of 0.9 to 1.1 and is enlarged again, bilinearly. Equivalent to
    ``RandomApply([RandomResizedCrop(s, (0.8, 1), (0.9, 1.1))])`` and ``RandomHorizontalFlip()`` of torchvision, but
    for crops that would not fit, which are cut to the image here and drawn anew there.

    Args:
        images: In -1 to 1, float, shape ``(N, 3, H, W)``.
        generator: Source of all random numbers, on the CPU.

    Returns:
        Shape as ``images``.
    """
    count = len(images)
    cropped, area, aspect, right, down, flipped = torch.rand(6, count, generator=generator)
    side = (0.8 + 0.2 * area).sqrt()
    stretch = torch.exp((2 * aspect - 1) * torch.log(torch.tensor(1.1))).sqrt()
    whole = cropped >= 0.5
    width = torch.where(whole, 1.0, (side * stretch).clamp(max=1))
    height = torch.where(whole, 1.0, (side / stretch).clamp(max=1))
    mirror = torch.where(flipped < 0.5, -1.0, 1.0)
    zeros = torch.zeros(count)
    theta = torch.stack(
        [
            torch.stack([mirror * width, zeros, (1 - width) * (2 * right - 1)], dim=1),
            torch.stack([zeros, height, (1 - height) * (2 * down - 1)], dim=1),
        ],
        dim=1,
    ).to(images)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def to_signal(pixels: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 in -1 to 1."""
    return pixels.float() * (2 / 255) - 1
