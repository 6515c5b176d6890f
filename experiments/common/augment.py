"""Random crops and flips on batches of images, the same on every device for one seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def augment(images: Tensor, *, generator: torch.Generator, pad: int, flip: bool) -> Tensor:
    """Shift each image by up to ``pad`` pixels over a black border and flip half of them left to right.

    Equivalent to ``RandomCrop(H, padding=pad)`` and ``RandomHorizontalFlip()`` of torchvision on each image.

    Args:
        images: Shape ``(N, C, H, W)``, any dtype, any device.
        generator: Source of the shifts and flips, on the CPU.
        pad: Largest shift, in pixels.
        flip: Whether to flip.

    Returns:
        Shape, dtype and device as ``images``.
    """
    count, channels, height, width = images.shape
    padded = nn.functional.pad(images, (pad, pad, pad, pad))
    shifts = torch.randint(2 * pad + 1, (2, count, 1), generator=generator)
    rows = shifts[0] + torch.arange(height)
    columns = shifts[1] + torch.arange(width)
    if flip:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    samples = torch.arange(count, device=images.device)[:, None, None, None]
    planes = torch.arange(channels, device=images.device)[:, None, None]
    return padded[samples, planes, rows[:, None, :, None], columns[:, None, None, :]]


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 with about zero mean and unit deviation, CIFAR-10's constants for every set."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std
