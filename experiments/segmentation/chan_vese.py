"""Divide images in two regions of little variation each, with a short boundary."""

from __future__ import annotations

import numpy as np

_ETA = 1e-16
_PLANE = (-2, -1)


def chan_vese(
    image: np.ndarray,
    start: np.ndarray,
    *,
    mu: float = 0.05,
    lambda1: float = 2.0,
    lambda2: float = 1.0,
    step: float = 0.5,
    tolerance: float = 1e-3,
    iterations: int = 500,
) -> np.ndarray:
    """Move level sets by semi-implicit steps until each rests.

    Equivalent to ``skimage.segmentation.chan_vese`` of each image with ``start`` as its ``init_level_set``.

    Args:
        image: Shape ``(..., H, W)``, floating; each is scaled to 0 to 1 here.
        start: Level set of each image, shape as ``image``, positive inside.
        mu: Weight of the boundary's length.
        lambda1: Weight of the variation inside.
        lambda2: Weight of the variation outside.
        step: Length of a step.
        tolerance: Root mean square of a step's change at which a level set rests.
        iterations: Steps at most.

    Returns:
        Inside, bool, shape as ``image``.

    Raises:
        ValueError: If there is no plane, or the level set has another shape.

    Source: Chan & Vese (2001), Active contours without edges; Getreuer (2012), Chan-Vese segmentation.
    """
    if image.ndim < 2 or image.shape != start.shape:
        raise ValueError(
            f"chan_vese: image and start must have one shape (..., H, W), got {image.shape} and {start.shape}"
        )
    images = image.reshape(-1, *image.shape[-2:])
    images = images - images.min(_PLANE, keepdims=True)
    images = images / np.maximum(images.max(_PLANE, keepdims=True), np.finfo(images.dtype).tiny)
    phi = start.reshape(images.shape).astype(np.float64)
    moving = np.arange(len(phi))
    for _ in range(iterations):
        moved = _moved(images[moving], phi[moving], mu, lambda1, lambda2, step)
        change = np.sqrt(np.mean((moved - phi[moving]) ** 2, axis=_PLANE))
        phi[moving] = moved
        moving = moving[change > tolerance]
        if not len(moving):
            break
    return (phi > 0).reshape(image.shape)


def _moved(image: np.ndarray, phi: np.ndarray, mu: float, lambda1: float, lambda2: float, step: float) -> np.ndarray:
    padded = np.pad(phi, ((0, 0), (1, 1), (1, 1)), mode="edge")
    east, west, south, north = padded[:, 1:-1, 2:], padded[:, 1:-1, :-2], padded[:, 2:, 1:-1], padded[:, :-2, 1:-1]
    across, down = (east - west) / 2, (south - north) / 2
    weights = [
        1 / np.sqrt(_ETA + along**2 + cross**2)
        for along, cross in ((east - phi, down), (phi - west, down), (south - phi, across), (phi - north, across))
    ]
    length = sum(weight * side for weight, side in zip(weights, (east, west, south, north), strict=True))
    inside = phi > 0
    variation = lambda2 * (image - _mean(image, ~inside)) ** 2 - lambda1 * (image - _mean(image, inside)) ** 2
    rate = step / (1 + phi**2)
    return (phi + rate * (mu * length + variation)) / (1 + mu * rate * sum(weights))


def _mean(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Mean of each image in its region, 0 where that is empty; shape ``(N, 1, 1)``."""
    total = np.where(region, image, 0).sum(_PLANE, keepdims=True)
    return total / np.maximum(region.sum(_PLANE, keepdims=True), 1)
