"""Numbers about decompositions: how exact they are and how smooth R is."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.class_transfer.decomposer import Decomposition
from experiments.common.gaussian import gaussian_smooth


def roughness(R: Tensor, x: Tensor) -> float:
    """Energy of R beyond a Gaussian of 1 pixel, as a share of the image's: 0 is smooth, 1 is as rough as the image.

    Args:
        R: Shape ``(N, C, H, W)``.
        x: Likewise.

    Returns:
        Mean over the images.
    """
    fine = [(part - gaussian_smooth(part, 1.0)).square().flatten(1).sum(1) for part in (R, x)]
    return (fine[0] / fine[1].clamp(min=torch.finfo(x.dtype).tiny)).mean().item()


def low_pass_psnr(f: Tensor, x: Tensor, sigma: float) -> float:
    """How alike two sets of images are to a Gaussian's eye: PSNR of the smoothed images, in dB.

    Args:
        f: In -1 to 1, or beyond, shape ``(N, C, H, W)``.
        x: In -1 to 1, likewise.
        sigma: Deviation of the Gaussian, in pixels.

    Returns:
        Mean over the images; the peak is the range of x, which is 2.
    """
    square = gaussian_smooth(f - x, sigma).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / square.clamp(min=torch.finfo(x.dtype).tiny))).mean().item()


def output_error(parts: Decomposition, f: Tensor) -> float:
    """Largest difference between the network's output f and ``R + v.sum(0)``."""
    return (f - parts.R - parts.v.sum(0)).abs().max().item()


def input_error(parts: Decomposition, x: Tensor) -> float | None:
    """Largest difference between the image and ``R + phi.sum(0)``, or None without bands."""
    return None if parts.phi is None else (x - parts.R - parts.phi.sum(0)).abs().max().item()


def shares(parts: Decomposition) -> list[float]:
    """Energy of each branch's part, as a share of the sum of all."""
    energies = parts.v.square().flatten(1).sum(1)
    return (energies / energies.sum()).tolist()
