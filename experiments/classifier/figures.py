"""Draw what :mod:`bsfast.plotting` has no general form of: arrays -> matplotlib Figure, without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from bsfast import plotting


def covariances(matrices: Sequence[np.ndarray], titles: Sequence[str], columns: int = 5) -> Figure:
    """Draw covariances of branches, each on its own scale: Figure 5, middle, and Figure 17, right.

    Args:
        matrices: Covariances, each of shape ``(M, M)``; M may differ.
        titles: One a matrix.
        columns: Panels in a row at most.

    Returns:
        The figure.
    """
    columns = min(columns, len(matrices))
    figure = plotting.covariance_figure(list(matrices), titles=titles, shared_scale=False, columns=columns)
    rows = -(-len(matrices) // columns)
    figure.set_size_inches(4.3 * columns, 3.6 * rows)
    return figure


def gallery(images: np.ndarray, row_names: Sequence[str], columns: int) -> Figure:
    """Draw rows of images, in the order given from left to right and then down: Figures 8 and 16.

    Args:
        images: Pixels, uint8, shape ``(rows, count, 3, H, W)``.
        row_names: One a row of images.
        columns: Images side by side at most; a longer row is broken.

    Returns:
        The figure, one panel a row of images.
    """
    rows, count, _, height, width = images.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    size = max(0.42, 5.0 / columns)  # in inches; the rows' names need some width
    figure = Figure(figsize=(size * columns + 0.4, rows * (size * lines + 0.35)), layout="constrained")
    for axes, own, name in zip(figure.subplots(rows, 1, squeeze=False)[:, 0], images, row_names, strict=True):
        sheet = np.full((lines * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, dtype=np.uint8)
        for index, image in enumerate(own):
            top, left = index // columns * (height + 1), index % columns * (width + 1)
            sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
        axes.imshow(sheet, interpolation="nearest")
        axes.set_title(name, fontsize=9, loc="left", pad=2)
        axes.set_axis_off()
    return figure


def training(names: Sequence[str], loss: Sequence[Sequence[float]], accuracy: Sequence[Sequence[float]]) -> Figure:
    """Draw loss above its floor and test accuracy against the epoch.

    Args:
        names: One a model.
        loss: Training loss above its floor after each epoch, in nats, one list a model.
        accuracy: Share of test images classified right after each epoch, one list a model.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    shades = np.linspace(0.15, 0.85, max(len(names), 2))
    for shade, name, losses, accuracies in zip(shades, names, loss, accuracy, strict=False):
        epochs = np.arange(1, len(losses) + 1)
        style = {"color": (0.0, 0.25 + 0.5 * (1 - shade), 0.7 * shade + 0.3), "marker": "o", "markersize": 3}
        axes[0].plot(epochs, losses, label=name, **style)
        axes[1].plot(epochs, 100 * np.array(accuracies), label=name, **style)
    axes[0].set_ylabel("training loss above its floor (nats)")
    axes[1].set_ylabel("test accuracy (%)")
    for panel in axes:
        panel.set_xlabel("epoch")
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    if names:
        axes[1].legend(frameon=False, fontsize=8)
    return figure
