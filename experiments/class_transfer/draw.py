"""Draw sheets of images and the course of a training: arrays -> matplotlib Figure, without PyTorch."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

_GAP = 2  # pixels between the images of a sheet


def sheet(images: np.ndarray) -> np.ndarray:
    """Put images side by side.

    Args:
        images: Pixels, uint8, shape ``(rows, columns, 3, H, W)``.

    Returns:
        Pixels on white, uint8, shape ``(height, width, 3)``.
    """
    rows, columns, _, height, width = images.shape
    whole = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (height + _GAP), column * (width + _GAP)
        whole[top : top + height, left : left + width] = images[row, column].transpose(1, 2, 0)
    return whole


def sheet_png(images: np.ndarray) -> bytes:
    """Encode a :func:`sheet` as PNG, pixel by pixel."""
    content = io.BytesIO()
    Image.fromarray(sheet(images)).save(content, "PNG")
    return content.getvalue()


def samples(images: np.ndarray, columns: Sequence[str], rows: Sequence[str] | None = None) -> Figure:
    """Draw a sheet with a name above each column, and before each row where rows have names.

    Args:
        images: Pixels, uint8, shape ``(rows, columns, 3, H, W)``.
        columns: One name each.
        rows: Likewise.

    Returns:
        The figure.
    """
    down, across, _, height, width = images.shape
    figure = Figure(figsize=(0.85 * across + 0.4 * bool(rows), 0.85 * down + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet(images), interpolation="nearest")
    axes.set_xticks([column * (width + _GAP) + width / 2 for column in range(across)], columns, fontsize=8)
    axes.xaxis.tick_top()
    names = [""] * down if rows is None else rows
    axes.set_yticks([row * (height + _GAP) + height / 2 for row in range(down)], names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def training(steps: Sequence[int], losses: dict[str, Sequence[float]], roughness: Sequence[float]) -> Figure:
    """Draw the losses of both players, and how rough R is, against the step.

    Args:
        steps: Of each entry.
        losses: Name to values, in nats.
        roughness: Energy of R beyond a Gaussian of 1 pixel, as a share of the image's.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in losses.items():
        left.plot(steps, values, label=name, marker="o", markersize=2)
    left.set_ylabel("loss (nats)")
    left.legend(frameon=False, fontsize=8)
    right.plot(steps, roughness, color="black", marker="o", markersize=2)
    right.set_ylabel("roughness of R (share of the image's)")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
