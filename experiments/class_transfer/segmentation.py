"""The paper's segmentation of eyes from a decomposition: its Figures 12 and 21.

Some components tell where the eyes are and give the initial level set; others are nearly constant inside eyes and make
the image that is divided.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from experiments.class_transfer.chan_vese import chan_vese

_COMPONENTS = 3  # in each set
_LEAST_AREA = 5e-4  # of the image
_LEAST_OVERLAP = 0.5  # of the rows of two eyes
_EIGHT = np.ones((3, 3), dtype=int)  # neighbours


class ComponentSets(NamedTuple):
    """Which components are used.

    Attributes:
        locating: Components whose values tell eyes from the rest.
        bright: Of each of these, whether eyes are brighter than the rest.
        constant: Components that vary little inside eyes.
    """

    locating: tuple[int, ...]
    bright: tuple[bool, ...]
    constant: tuple[int, ...]


class Segmentation(NamedTuple):
    """Eyes in an image, and how they were found; each of shape ``(H, W)``.

    Attributes:
        mask: Bool.
        start: Initial level set, positive where eyes are thought to be.
        image: What was divided, 0 to 1.
    """

    mask: np.ndarray
    start: np.ndarray
    image: np.ndarray


def values(v: np.ndarray) -> np.ndarray:
    """Scale each part of each image to 0 to 1, jointly over its channels, and take the largest channel.

    Args:
        v: Parts, shape ``(..., 3, H, W)``.

    Returns:
        The value of HSV, shape ``(..., H, W)``.
    """
    low, high = (bound(v, axis=(-3, -2, -1), keepdims=True) for bound in (np.min, np.max))
    return ((v - low) / np.maximum(high - low, np.finfo(v.dtype).tiny)).max(axis=-3)


def choose_components(v: np.ndarray, eyes: np.ndarray) -> ComponentSets:
    """Choose the sets on images whose eyes are known.

    Args:
        v: Parts, shape ``(M, N, 3, H, W)``.
        eyes: Bool, shape ``(N, H, W)``.

    Returns:
        The three components whose values' area under the ROC curve is farthest from a half, and the three whose spread
        inside the eyes of an image is least, relative to that in the whole image.
    """
    from sklearn.metrics import roc_auc_score

    made = values(v)
    areas = np.array([roc_auc_score(eyes.ravel(), part.ravel()) for part in made])
    locating = np.argsort(-np.abs(areas - 0.5))[:_COMPONENTS]
    seen = [index for index, mask in enumerate(eyes) if mask.sum() > 1]
    spread = [
        np.mean([part[index][eyes[index]].std() / max(part[index].std(), 1e-12) for index in seen]) for part in made
    ]
    constant = np.argsort(spread)[:_COMPONENTS]
    return ComponentSets(tuple(locating.tolist()), tuple((areas[locating] > 0.5).tolist()), tuple(constant.tolist()))


def segment(v: np.ndarray, chosen: ComponentSets) -> Segmentation:
    """Find the eyes of one image.

    Args:
        v: Parts, shape ``(M, 3, H, W)``.
        chosen: Component sets.

    Returns:
        The eyes: regions that come in pairs side by side.
    """
    made = values(v)
    where = np.mean(
        [made[k] if bright else 1 - made[k] for k, bright in zip(chosen.locating, chosen.bright, strict=True)], axis=0
    )
    start = where - otsu(where)
    image = made[list(chosen.constant)].mean(axis=0)
    return Segmentation(pairs(chan_vese(image, start)), start, image)


def otsu(image: np.ndarray) -> float:
    """Find the threshold that separates two groups of values best: the largest variance between them.

    Equivalent to ``skimage.filters.threshold_otsu`` but for its 256 bins.

    Args:
        image: Of any shape, at least two different values.

    Returns:
        Middle between the groups.

    Source: Otsu (1979), A threshold selection method from gray-level histograms.
    """
    ordered = np.sort(image, axis=None).astype(np.float64)
    below = np.arange(1, len(ordered))
    total = np.cumsum(ordered)
    difference = total[:-1] / below - (total[-1] - total[:-1]) / (len(ordered) - below)
    between = below * (len(ordered) - below) * difference**2
    at = int(between.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


def pairs(mask: np.ndarray) -> np.ndarray:
    """Keep regions that have exactly one other beside them.

    The median number of regions on the rows that a region covers must be 2, and the rows of one of the others must
    overlap its own by half of their union. Regions below 0.05 % of the image are dropped first.

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
    kept = [
        index
        for index in large
        if np.median(crowd[rows[index]]) == 2
        and any(_overlap(rows[index], rows[other]) >= _LEAST_OVERLAP for other in large if other != index)
    ]
    return np.isin(labels, kept)


def count_regions(mask: np.ndarray) -> int:
    """Count the regions of a mask."""
    return int(ndimage.label(mask, structure=_EIGHT)[1])


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Twice the common area over the sum of both; 1 for two empty masks."""
    total = mask.sum() + truth.sum()
    return float(2 * (mask & truth).sum() / total) if total else 1.0


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())
