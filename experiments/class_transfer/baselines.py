"""Decompositions that nothing was trained for, to compare branches with; each maps images to M parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from experiments.common.gaussian import gaussian_smooth

Decompose = Callable[[Tensor], Tensor]
_FINEST = 0.4  # pixels
_ITERATIONS = 100
_SEED = 0


def laplacian_bands(count: int, sigma: float) -> Decompose:
    """Differences of Gaussians whose widths grow geometrically; they sum to the image less its Gaussian.

    Args:
        count: Number of bands M.
        sigma: Deviation of the widest, in pixels, above 0.4.

    Returns:
        Maps images ``(N, 3, H, W)`` to bands ``(M, N, 3, H, W)`` from fine to coarse.
    """
    widths = np.geomspace(_FINEST, sigma, count) if count > 1 else [sigma]

    def decompose(x: Tensor) -> Tensor:
        smooth = torch.stack([x, *(gaussian_smooth(x, float(width)) for width in widths)])
        return smooth[:-1] - smooth[1:]

    return decompose


def principal_parts(fine: Tensor, count: int, smooth: Callable[[Tensor], Tensor]) -> Decompose:
    """Principal components of images less their smooth part: the projection on each.

    Args:
        fine: Training images less their smooth part, shape ``(N, 3, H, W)``.
        count: Number of components M, at most N.
        smooth: Maps images to their smooth part.

    Returns:
        Maps images ``(N, 3, H, W)`` to parts ``(M, N, 3, H, W)``.
    """
    return _linear_parts(PCA(count, svd_solver="randomized", random_state=_SEED), fine, smooth)


def independent_parts(fine: Tensor, count: int, smooth: Callable[[Tensor], Tensor]) -> Decompose:
    """Independent components, found by FastICA; else as :func:`principal_parts`."""
    whiten = {"whiten": "unit-variance", "max_iter": _ITERATIONS, "tol": 1e-3}
    return _linear_parts(FastICA(count, random_state=_SEED, **whiten), fine, smooth)


def _linear_parts(model: PCA | FastICA, fine: Tensor, smooth: Callable[[Tensor], Tensor]) -> Decompose:
    with warnings.catch_warnings():
        # FastICA of images seldom settles; where it stands after the last iteration is what is compared.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(fine.flatten(1).double().numpy())
    mixing = getattr(model, "mixing_", None)
    directions = model.components_.T if mixing is None else mixing

    def decompose(x: Tensor) -> Tensor:
        amounts = model.transform((x - smooth(x)).flatten(1).double().numpy())
        parts = amounts.T[:, :, None] * directions.T[:, None, :]
        return torch.from_numpy(parts).view(-1, *x.shape).to(x.dtype)

    return decompose
