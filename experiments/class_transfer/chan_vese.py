"""Divide an image in two regions of little variation each, with a short boundary."""

from __future__ import annotations

import numpy as np

_ETA = 1e-16


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
    """Move a level set by semi-implicit steps until it rests.

    Equivalent to ``skimage.segmentation.chan_vese`` with ``start`` as its ``init_level_set``.

    Args:
        image: Shape ``(H, W)``, floating; scaled to 0 to 1 here.
        start: Level set, shape ``(H, W)``, positive inside.
        mu: Weight of the boundary's length.
        lambda1: Weight of the variation inside.
        lambda2: Weight of the variation outside.
        step: Length of a step.
        tolerance: Root mean square of a step's change at which it rests.
        iterations: Steps at most.

    Returns:
        Inside, bool, shape ``(H, W)``.

    Raises:
        ValueError: If the image is not a plane, or the level set has another shape.

    Source: Chan & Vese (2001), Active contours without edges; Getreuer (2012), Chan-Vese segmentation.
    """
    if image.ndim != 2 or image.shape != start.shape:
        raise ValueError(f"chan_vese: image and start must have one shape (H, W), got {image.shape} and {start.shape}")
    image = image - image.min()
    image = image / image.max() if image.max() > 0 else image
    phi = start.astype(np.float64)
    for _ in range(iterations):
        before, phi = phi, _moved(image, phi, mu, lambda1, lambda2, step)
        if np.sqrt(np.mean((phi - before) ** 2)) <= tolerance:
            break
    return phi > 0


def _moved(image: np.ndarray, phi: np.ndarray, mu: float, lambda1: float, lambda2: float, step: float) -> np.ndarray:
    padded = np.pad(phi, 1, mode="edge")
    east, west, south, north = padded[1:-1, 2:], padded[1:-1, :-2], padded[2:, 1:-1], padded[:-2, 1:-1]
    across, down = (east - west) / 2, (south - north) / 2
    weights = [
        1 / np.sqrt(_ETA + along**2 + cross**2)
        for along, cross in ((east - phi, down), (phi - west, down), (south - phi, across), (phi - north, across))
    ]
    length = sum(weight * side for weight, side in zip(weights, (east, west, south, north), strict=True))
    inside = phi > 0
    means = [image[region].mean() if region.any() else 0.0 for region in (inside, ~inside)]
    variation = lambda2 * (image - means[1]) ** 2 - lambda1 * (image - means[0]) ** 2
    rate = step / (1 + phi**2)
    return (phi + rate * (mu * length + variation)) / (1 + mu * rate * sum(weights))
