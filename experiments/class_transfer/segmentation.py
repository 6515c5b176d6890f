"""The paper's segmentation of eyes from a decomposition: its Figures 12 and 21.

Some components tell where the eyes are and give the initial level set; others are nearly constant inside eyes and make
the image that is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import ndimage
from scipy.stats import rankdata

from experiments.class_transfer.chan_vese import chan_vese

Member = TypeVar("Member")
_COMPONENTS = 3  # in each set at most
_MU, _LAMBDA1 = (0.05, 0.01, 0.1, 0.2), (2.0, 0.5, 1.0, 4.0)  # the first where none is better
_TRIED = 100  # steps of the level set while the choice is made
_LEAST_AREA = 5e-4  # of the image
_LEAST_OVERLAP = 0.5  # of the rows of two eyes
_EIGHT = np.ones((3, 3), dtype=int)  # neighbours


class ComponentSets(NamedTuple):
    """Which components are used, and how the level set moves.

    Attributes:
        locating: Components whose values tell eyes from the rest.
        bright: Of each of these, whether eyes are brighter than the rest.
        constant: Components that vary little inside eyes.
        mu: Weight of the boundary's length.
        lambda1: Weight of the variation inside; that outside has 1.
    """

    locating: tuple[int, ...]
    bright: tuple[bool, ...]
    constant: tuple[int, ...]
    mu: float = 0.05
    lambda1: float = 2.0


class Segmentation(NamedTuple):
    """Eyes in images, and how they were found; each of shape ``(N, H, W)``.

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
    """Choose on images whose eyes are known what a person would by eye: the sets that segment them best.

    Either set begins empty and takes, up to three times, the component that helps most: the locating ones by Dice of
    the start that they give, the constant ones by Dice of what is divided and of the pairs in it. Then the weights are
    chosen, likewise.

    Args:
        v: Parts, shape ``(M, N, 3, H, W)``.
        eyes: Bool, shape ``(N, H, W)``, some in each image.

    Returns:
        The choice.
    """
    made = values(v)
    signs = list(product(range(len(made)), (True, False)))
    locating = _grown(signs, lambda own: _mean_dice(_start(made, *zip(*own, strict=True)) > 0, eyes))
    components, bright = zip(*locating, strict=True)

    def found(constant: Sequence[int], **weights: float) -> float:
        start, image = _start(made, components, bright), _mean(made, constant)
        divided = chan_vese(image, start, iterations=_TRIED, **weights)
        # Pairs are what counts; where none is found yet, what is divided well leads there.
        return _mean_dice(_in_pairs(divided), eyes) + _mean_dice(divided, eyes)

    constant = _grown(range(len(made)), found)
    mu, lambda1 = max(product(_MU, _LAMBDA1), key=lambda own: found(constant, mu=own[0], lambda1=own[1]))
    return ComponentSets(components, bright, tuple(constant), mu, lambda1)


def segment(v: np.ndarray, chosen: ComponentSets) -> Segmentation:
    """Find the eyes of images.

    Args:
        v: Parts, shape ``(M, N, 3, H, W)``.
        chosen: Component sets.

    Returns:
        The eyes: regions that come in pairs side by side.
    """
    made = values(v)
    start, image = _start(made, chosen.locating, chosen.bright), _mean(made, chosen.constant)
    return Segmentation(_in_pairs(chan_vese(image, start, mu=chosen.mu, lambda1=chosen.lambda1)), start, image)


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


def _grown(members: Sequence[Member], score: Callable[[list[Member]], float]) -> list[Member]:
    """Add the member that raises the score most, as long as one does and up to three times."""
    chosen: list[Member] = []
    best = -np.inf
    while len(chosen) < _COMPONENTS:
        left = [member for member in members if member not in chosen]
        scores = [score([*chosen, member]) for member in left]
        if not left or max(scores) <= best:
            break
        best = max(scores)
        chosen.append(left[int(np.argmax(scores))])
    return chosen


def _start(made: np.ndarray, components: Sequence[int], bright: Sequence[bool]) -> np.ndarray:
    """Mean of components, those where eyes are dark turned over, less its threshold."""
    signs = zip(components, bright, strict=True)
    where = np.mean([made[k] if is_bright else 1 - made[k] for k, is_bright in signs], axis=0)
    return where - np.array([otsu(image) for image in where])[:, None, None]


def _mean(made: np.ndarray, components: Sequence[int]) -> np.ndarray:
    return made[list(components)].mean(axis=0)


def _in_pairs(masks: np.ndarray) -> np.ndarray:
    return np.stack([pairs(mask) for mask in masks])


def _mean_dice(masks: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([dice(mask, eyes) for mask, eyes in zip(masks, truth, strict=True)]))


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())
