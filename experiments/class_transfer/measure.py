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
