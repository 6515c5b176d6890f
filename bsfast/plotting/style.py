"""What the figures share: colours, colour limits, ticks and the checks of arrays."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Okabe & Ito's palette without yellow, which is too pale for a line on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SILENT_COLOUR = "0.72"
# The lightness of both arms falls alike from the white middle, so equal magnitudes look equally strong.
DIVERGING = LinearSegmentedColormap.from_list(
    "bsfast_diverging", ["#0f3f7d", "#4f97cf", "#b3d5ea", "#ffffff", "#ebcf52", "#c08600", "#573900"]
).with_extremes(bad="0.8")


def real_array(function: str, argument: str, value: ArrayLike, axes: str) -> Array:
    """Return ``value`` as a float64 array with the named axes (``"M, N, C"``), or say what is wrong with it."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{function}: {argument} must hold real numbers, got dtype {array.dtype}")
    if array.ndim != len(axes.split(", ")) or array.size == 0:
        raise ValueError(f"{function}: {argument} must have shape ({axes}) and not be empty, got {array.shape}")
    if np.isinf(array).any():
        raise ValueError(f"{function}: {argument} must not be infinite, got {int(np.isinf(array).sum())} such values")
    return array.astype(np.float64)


def class_axis(
    function: str, labels: ArrayLike, class_names: Sequence[str] | None, num_classes: int | None
) -> tuple[NDArray[np.intp], Array, list[str]]:
    """Order samples by class: their order, the positions where classes meet (both ends included), and the names."""
    label = np.asarray(labels)
    if label.dtype.kind not in "iu":
        raise TypeError(f"{function}: labels must be integers, got {label.dtype}")
    count = num_classes or (len(class_names) if class_names is not None else int(label.max()) + 1)
    names = names_of(function, "class_names", class_names, count)
    if label.min() < 0 or label.max() >= count:
        bad = label.min() if label.min() < 0 else label.max()
        raise ValueError(f"{function}: labels must be in [0, {count}), got {bad}")
    order = np.argsort(label, kind="stable")
    edges: Array = np.searchsorted(label[order], np.arange(count + 1)).astype(np.float64) - 0.5
    return order, edges, names


def names_of(function: str, argument: str, names: Sequence[str] | None, count: int) -> list[str]:
    """Return the names, numbers from 0 by default, or refuse a wrong number of them."""
    if names is None:
        return [str(index) for index in range(count)]
    if len(names) != count:
        raise ValueError(f"{function}: {argument} must have {count} names, got {len(names)}")
    return list(names)


def colour_limit(*arrays: Array, percentile: float = 100.0) -> float:
    """Symmetric colour limit: a percentile of the absolute values, their maximum if that is 0, 1 if all are."""
    values = np.concatenate([np.abs(array[~np.isnan(array)]) for array in arrays])
    if values.size == 0:
        return 1.0
    return float(np.percentile(values, percentile)) or float(values.max()) or 1.0


def heat_map(axes: Axes, array: Array, limit: float, *, square: bool = True) -> AxesImage:
    """Draw a matrix, rows downwards, on the diverging colours between -limit and limit."""
    axes.tick_params(length=2, labelsize=8)
    return axes.imshow(array, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="equal" if square else "auto")


def colour_bar(figure: Figure, image: AxesImage, axes: Axes | list[Axes], label: str, *, clipped: bool = False) -> None:
    """Add a slim scale beside ``axes``, with pointed ends if values beyond it may exist."""
    bar = figure.colorbar(
        image, ax=axes, aspect=30, fraction=0.05, pad=0.02, extend="both" if clipped else "neither", extendfrac=0.02
    )
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def branch_ticks(axis: Axis, num_branches: int) -> None:
    """Number branches from 1: all of them up to 10, else the first and every 4th, beyond 20 every 8th."""
    step = 1 if num_branches <= 10 else 4 if num_branches <= 20 else 8
    shown = [number for number in range(1, num_branches + 1) if number == 1 or number % step == 0]
    axis.set_ticks([number - 1 for number in shown], labels=[str(number) for number in shown])


def class_ticks(axes: Axes, edges: Array, names: Sequence[str], *, labelled: bool) -> None:
    """Mark where classes meet on the x axis, and name each class in the middle of its samples."""
    for edge in edges[1:-1]:
        axes.axvline(edge, color="0.25", linewidth=0.6)
    axes.set_xticks((edges[:-1] + edges[1:]) / 2, labels=names if labelled else [""] * len(names))
    axes.tick_params(axis="x", length=0, rotation=90 if sum(map(len, names)) > 24 else 0)


def panels(count: int, *, columns: int, width: float, height: float, title: str | None) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``count`` panels of this size in inches, filled row by row."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * width + 1.0, rows * height + 0.7), layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in grid[count:]:
        spare.set_axis_off()
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure, grid[:count]
