"""The paper's segmentation of eyes from a decomposition: its Figures 12 and 21.

Some components tell where the eyes are and give the initial level set; others are nearly constant inside eyes and make
the image that is divided. A component is a signed image, zero where its branch draws nothing and often of both signs
where it draws; so its magnitude is used, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from experiments.segmentation.chan_vese import chan_vese
from experiments.segmentation.regions import count_regions, dice, pairs

_COMPONENTS = 5  # in each set at most
_MU, _LAMBDA1, _STEPS = (0.05, 0.01, 0.002, 0.2), (2.0, 1.0, 4.0, 8.0, 16.0), (10, 40)  # the first where none is better
_MU_SIZE = 32  # of images to which these weights of length belong
_LEAST_SIZE = 8  # of images, in pixels
_CHOICE_SIZE = 64  # of images at most while the choice is made, whose time is in proportion to the pixels
_AT_REST = 500  # steps, tried once at the end
_AREAS = (0.07, 0.06, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015)  # of the image above a threshold; two eyes have 2.4 to 5 %
_AWAY = 3.0  # how far below 0 a level set begins outside of a pair: the further, the slower new regions come up
_LEAD = 0.2  # weight of what is divided beside the pairs, which are what counts: where there are none it leads there
_SMOOTH = 1 / 32  # of the image's size: a fifth of an eye's width


class ComponentSets(NamedTuple):
    """Which components are used, and how the level set moves.

    Attributes:
        locating: Names, as of :func:`pictures`, of those whose values tell eyes from the rest by being larger.
        constant: Names of those that vary little inside eyes.
        mu: Weight of the boundary's length at 32 pixels; it is in proportion to the image's size, for areas grow with
            the square.
        lambda1: Weight of the variation inside; that outside has 1.
        steps: Of the level set.
    """

    locating: tuple[str, ...]
    constant: tuple[str, ...]
    mu: float = 0.05
    lambda1: float = 2.0
    steps: int = 10


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


def pictures(v: np.ndarray) -> dict[str, np.ndarray]:
    """Make grey pictures of parts: of each its values and those of its magnitude, smoothed, and both turned over.

    Args:
        v: Parts, shape ``(M, N, 3, H, W)``.

    Returns:
        Pictures, 0 to 1, each of shape ``(N, H, W)``, by name: ``v1``, ``-v1``, ``|v1|``, ``-|v1|``, ``v2``, ...
    """
    made = {}
    for k, part in enumerate(v, start=1):
        for name, signal in ((f"v{k}", part), (f"|v{k}|", np.abs(part))):
            width = _SMOOTH * v.shape[-1]
            made[name] = ndimage.gaussian_filter(values(signal), (0, width, width), mode="nearest")
            made[f"-{name}"] = 1 - made[name]
    return made


def choose_components(v: np.ndarray, eyes: np.ndarray) -> ComponentSets:
    """Choose on images whose eyes are known what a person would by eye: the sets that segment them best.

    Either set begins empty and takes, up to five times, the picture of a component that helps most: the locating ones
    by Dice of what is above a threshold, the constant ones by Dice of what is divided and of the pairs in it. The
    weights are chosen likewise, twice: first with the locating ones divided, and at the end.

    Args:
        v: Parts, shape ``(M, N, 3, H, W)``; those beyond 64 pixels are averaged down, by whole numbers, and what
            is left at the lower and right side is cut off.
        eyes: Bool, shape ``(N, H, W)``, some in each image.

    Returns:
        The choice.

    Raises:
        ValueError: If a shape does not fit, or a part is not finite.
    """
    _check(v, eyes)
    made, eyes = pictures(_reduced(v)), _reduced(eyes) >= 0.5
    locating = _grown(made, lambda names: _mean_dice(_above(_mean(made, names), _small) > 0, eyes))
    start = _start(made, locating)

    def found(names: Sequence[str], weights: tuple[float, float, int]) -> float:
        divided = _divided(_mean(made, names), start, *weights)
        return _mean_dice(_in_pairs(divided), eyes) + _LEAD * _mean_dice(divided, eyes)

    first = max(product(_MU, _LAMBDA1, _STEPS), key=lambda weights: found(locating, weights))
    constant = _grown(made, lambda names: found(names, first))
    weights = max(product(_MU, _LAMBDA1, (*_STEPS, _AT_REST)), key=lambda weights: found(constant, weights))
    return ComponentSets(tuple(locating), tuple(constant), *weights)


def segment(v: np.ndarray, chosen: ComponentSets) -> Segmentation:
    """Find the eyes of images.

    Args:
        v: Parts, shape ``(M, N, 3, H, W)``.
        chosen: Component sets.

    Returns:
        The eyes: regions that come in pairs side by side.

    Raises:
        ValueError: If the parts do not fit or are not finite, or a set is empty or names others.
    """
    _check(v)
    made = pictures(v)
    for names in (chosen.locating, chosen.constant):
        if not names or not set(names) <= set(made):
            raise ValueError(f"segment: sets must name some of {', '.join(made)}, got {', '.join(names) or 'none'}")
    start, image = _start(made, chosen.locating), _mean(made, chosen.constant)
    return Segmentation(_in_pairs(_divided(image, start, chosen.mu, chosen.lambda1, chosen.steps)), start, image)


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


def _grown(names: Collection[str], score: Callable[[list[str]], float]) -> list[str]:
    """Add the name that raises the score most, as long as one does and up to five times."""
    chosen: list[str] = []
    best = -np.inf
    while len(chosen) < _COMPONENTS:
        left = [name for name in names if not {name, f"-{name}", name.removeprefix("-")} & set(chosen)]
        scores = [score([*chosen, name]) for name in left]
        if not left or max(scores) <= best:
            break
        best = max(scores)
        chosen.append(left[int(np.argmax(scores))])
    return chosen


def _reduced(planes: np.ndarray) -> np.ndarray:
    *leading, height, width = planes.shape
    factor = -(-max(height, width) // _CHOICE_SIZE)
    rows, columns = height // factor, width // factor
    whole = planes[..., : rows * factor, : columns * factor]
    return whole.reshape(*leading, rows, factor, columns, factor).mean((-3, -1))


def _check(v: np.ndarray, eyes: np.ndarray | None = None) -> None:
    if v.ndim != 5 or 0 in v.shape or v.shape[2] != 3 or min(v.shape[3:]) < _LEAST_SIZE:
        raise ValueError(
            f"segmentation: v must have shape (M, N, 3, H, W) of {_LEAST_SIZE} pixels or more, got {v.shape}"
        )
    if not np.issubdtype(v.dtype, np.floating) or not np.isfinite(v).all():
        raise ValueError(
            f"segmentation: v must be floating and finite, got {v.dtype}, {np.sum(~np.isfinite(v))} not finite"
        )
    if eyes is not None and eyes.shape != (v.shape[1], *v.shape[3:]):
        raise ValueError(f"segmentation: eyes must have shape {(v.shape[1], *v.shape[3:])}, got {eyes.shape}")


def _divided(image: np.ndarray, start: np.ndarray, mu: float, lambda1: float, steps: int) -> np.ndarray:
    return chan_vese(image, start, mu=mu * image.shape[-1] / _MU_SIZE, lambda1=lambda1, iterations=steps)


def _start(made: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Level sets that are positive in a pair of regions, if some threshold has one."""
    where = _mean(made, names)
    start = _above(where, _paired)
    for level in start:
        pair = pairs(level > 0)
        if pair.any():
            level[~pair] -= _AWAY
    return start


def _above(images: np.ndarray, threshold: Callable[[np.ndarray], float]) -> np.ndarray:
    return images - np.array([threshold(image) for image in images])[:, None, None]


def _small(image: np.ndarray) -> float:
    """Otsu's threshold of what is above Otsu's threshold, for eyes are a small part of an image."""
    first = otsu(image)
    above = image[image > first]
    return otsu(above) if above.size and above.min() < above.max() else first


def _paired(image: np.ndarray) -> float:
    """That threshold, or the first above it at which two regions make a pair: eyes may run together below."""
    least = _small(image)
    higher = [level for level in np.quantile(image, 1 - np.array(_AREAS)) if level > least]
    return next((level for level in (least, *higher) if count_regions(pairs(image > level)) == 2), least)


def _mean(made: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.mean([made[name] for name in names], axis=0)


def _in_pairs(masks: np.ndarray) -> np.ndarray:
    return np.stack([pairs(mask) for mask in masks])


def _mean_dice(masks: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([dice(mask, eyes) for mask, eyes in zip(masks, truth, strict=True)]))
