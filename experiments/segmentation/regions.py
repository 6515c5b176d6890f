"""Regions of masks: which come in pairs, and how well masks and values agree with the truth."""

from itertools import combinations

import numpy as np
from scipy import ndimage
from scipy.stats import rankdata

# Eyes of synthetic cats, which are tilted, have 1.2 to 2.5 % of the image each and share 28 % of their rows or more.
_LEAST_AREA = 4e-3  # of the image
_LEAST_OVERLAP = 0.25  # of the rows of two eyes
_EIGHT = np.ones((3, 3), dtype=int)  # neighbours


def pairs(mask: np.ndarray) -> np.ndarray:
    """Keep pairs of regions that lie side by side.

    The rows that either covers must have 2 regions at most, itself among them, and both must share a quarter of the
    rows that they cover together. Regions below 0.4 % of the image are dropped first.

    Args:
        mask: Bool, shape ``(H, W)``.

    Returns:
        Bool, shape ``(H, W)``.
    """
    labels, count = ndimage.label(mask, structure=_EIGHT)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    large = [index for index in range(1, count + 1) if areas[index] >= _LEAST_AREA * mask.size]
    rows = {index: (labels == index).any(axis=1) for index in large}
    crowd = sum(rows.values()) if rows else None
    apart = [index for index in large if crowd[rows[index]].max() == 2]
    found = [pair for pair in combinations(apart, 2) if _overlap(*(rows[index] for index in pair)) >= _LEAST_OVERLAP]
    return np.isin(labels, found)


def count_regions(mask: np.ndarray) -> int:
    """Count the regions of a mask."""
    return int(ndimage.label(mask, structure=_EIGHT)[1])


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Twice the common area over the sum of both; 1 for two empty masks."""
    total = mask.sum() + truth.sum()
    return float(2 * (mask & truth).sum() / total) if total else 1.0


def roc_area(values: np.ndarray, eyes: np.ndarray) -> float:
    """Area under the ROC curve of values that tell eyes from the rest by being larger.

    Args:
        values: Shape ``(N, H, W)``.
        eyes: Bool, likewise.

    Returns:
        Mean over the images that have both.
    """
    ranks, inside = rankdata(values.reshape(len(values), -1), axis=1), eyes.reshape(len(eyes), -1)
    count = inside.sum(1)
    both = count * (inside.shape[1] - count)
    wins = (ranks * inside).sum(1) - count * (count + 1) / 2
    return float(np.mean(wins[both > 0] / both[both > 0]))


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())
