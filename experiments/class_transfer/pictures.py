"""Turn decompositions into pixels: which images are shown, which gain each branch gets, how branches are grouped."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experiments.class_transfer.augment import to_signal
from experiments.common.data import ImageSet

_SHOWN_SHARE = 0.995  # of a branch's pixels that are within the colour range
_FIGURE_PIXELS = 64  # a figure's data is text
_RINGS = 8  # of the power spectrum


def shown_images(dataset: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """The first test images, the classes in turn: in -1 to 1, shape ``(count, 3, H, W)``, and their labels."""
    labels, classes = dataset.test_labels, range(len(dataset.classes))
    members = [(labels == label).nonzero()[:, 0] for label in classes]
    ranked = sorted((rank, label) for label in classes for rank in range(len(members[label])))
    chosen = torch.stack([members[label][rank] for rank, label in ranked[:count]])
    return to_signal(dataset.test_images[chosen]), labels[chosen]


def gains(v: Tensor) -> Tensor:
    """Factor on each branch's part that brings 99.5 % of its pixels into -1 to 1.

    Args:
        v: Shape ``(M, N, 3, H, W)``.

    Returns:
        Shape ``(M,)``.
    """
    sizes = v.abs().flatten(1)
    last = int(_SHOWN_SHARE * (sizes.shape[1] - 1)) + 1
    return 1 / sizes.kthvalue(last, dim=1).values.clamp(min=1e-8)


def amplified(v: Tensor) -> Tensor:
    """Each branch's part ``(M, N, 3, H, W)`` times its gain: 0 is grey, 1 white."""
    return v * gains(v)[:, None, None, None, None]


def to_pixels(signal: Tensor) -> np.ndarray:
    """Clamp to -1 to 1 and turn into uint8."""
    return ((signal.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def reduced(pixels: np.ndarray) -> np.ndarray:
    """Average images ``(..., H, W)``, H = W a power of 2, down to 64 pixels if they are larger."""
    side = pixels.shape[-1]
    factor = max(1, side // _FIGURE_PIXELS)
    blocks = pixels.reshape(*pixels.shape[:-2], side // factor, factor, side // factor, factor)
    return blocks.mean((-3, -1)).round().astype(np.uint8)


def two_groups(v: Tensor) -> tuple[list[int], list[int]]:
    """Divide branches in two by what they draw: how fine and how colourful it is.

    The features are the shares of a branch's power in rings of the spectrum and in differences of colour, clustered
    by 2-means.

    Args:
        v: Parts, shape ``(M, N, 3, H, W)``, M at least 2.

    Returns:
        Indices of the branches of either group, the finer group first.
    """
    from sklearn.cluster import KMeans

    power = torch.fft.fft2(v.double()).abs().square().sum((1, 2))
    frequency = torch.fft.fftfreq(v.shape[-1], dtype=torch.float64)
    ring = (2 * _RINGS * (frequency[:, None] ** 2 + frequency**2).sqrt()).long().clamp(max=_RINGS - 1)
    rings = torch.stack([power[:, ring == index].sum(1) for index in range(_RINGS)], dim=1)
    colourful = (v - v.mean(2, keepdim=True)).double().square().flatten(1).sum(1)
    total = power.sum((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
    features = torch.cat([rings, (v.shape[-1] ** 2 * colourful)[:, None]], dim=1) / total[:, None]
    group = torch.from_numpy(KMeans(2, n_init=10, random_state=0).fit_predict(features.numpy()))
    fineness = features[:, :_RINGS] @ torch.arange(_RINGS, dtype=torch.float64)
    groups = sorted(
        ((group == index).nonzero()[:, 0] for index in range(2)), key=lambda own: fineness[own].mean().item()
    )
    coarse, fine = (own.tolist() for own in groups)
    return fine, coarse
