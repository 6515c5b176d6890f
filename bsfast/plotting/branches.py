"""Figures of branches against each other: covariances, responses, numbers of active and silent branches."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike

from bsfast.plotting.style import (
    LINE_COLOURS,
    SILENT_COLOUR,
    Array,
    branch_ticks,
    colour_bar,
    colour_limit,
    heat_map,
    names_of,
    panels,
    real_array,
)


def covariance_figure(
    matrices: Array | Sequence[ArrayLike],
    *,
    titles: Sequence[str] | None = None,
    shared_scale: bool = True,
    columns: int = 5,
    colour_label: str = r"$FF^\top$",
    title: str | None = None,
) -> Figure:
    """Draw branch-by-branch matrices (covariance, cosine) as heat maps.

    Source: the paper, Fig. 3 (right), Fig. 5 and Fig. 17 (right).

    Args:
        matrices: One matrix of shape ``(M, M)``, or several, whose M may differ.
        titles: One a panel.
        shared_scale: One colour scale for all panels; otherwise each its own.
        columns: Panels in a row at most.
        colour_label: Name of the quantity and its unit.
        title: Title of the figure.

    Returns:
        The figure; the panels come first in ``figure.axes``.

    Raises:
        ValueError: If a matrix is not square, is empty or infinite, or titles do not fit.

    Example:
        >>> figure = covariance_figure([np.eye(4), -np.eye(2)], titles=["initial", "trained"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['initial', 'trained']
    """
    stack: list[ArrayLike] = list(matrices)
    if isinstance(matrices, np.ndarray) and matrices.ndim == 2:
        stack = [matrices]
    if not stack or columns < 1:
        raise ValueError(f"covariance_figure: matrices and columns must be at least 1, got {len(stack)} and {columns}")
    arrays = [real_array("covariance_figure", "matrices", matrix, "M, M") for matrix in stack]
    for array in arrays:
        if array.shape[0] != array.shape[1]:
            raise ValueError(f"covariance_figure: matrices must have shape (M, M), got {array.shape}")
    names = [""] * len(arrays) if titles is None else names_of("covariance_figure", "titles", titles, len(arrays))
    figure, grid = panels(len(arrays), columns=columns, width=2.1, height=2.1, title=title)
    common = colour_limit(*arrays)
    for index, (axes, array, name) in enumerate(zip(grid, arrays, names, strict=True)):
        image = heat_map(axes, array, common if shared_scale else colour_limit(array))
        axes.set_title(name, fontsize=9)
        branch_ticks(axes.xaxis, len(array))
        branch_ticks(axes.yaxis, len(array))
        if index + columns >= len(arrays):
            axes.set_xlabel("branch", fontsize=8)
        if index % columns == 0:
            axes.set_ylabel("branch", fontsize=8)
        if not shared_scale:
            colour_bar(figure, image, axes, "")
    if shared_scale:
        colour_bar(figure, image, grid, colour_label)
    return figure


def responses_figure(
    responses: ArrayLike | None = None,
    *,
    x: ArrayLike | None = None,
    curves: ArrayLike | None = None,
    total: ArrayLike | None = None,
    targets: tuple[ArrayLike, ArrayLike] | None = None,
    active: ArrayLike | None = None,
    sample_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the response matrix as a heat map, the branches' curves v_k(x), or both side by side.

    Source: the paper, Fig. 4 (left and middle).

    Args:
        responses: Response matrix F, shape ``(M, D)``.
        x: Where the curves were evaluated, shape ``(X,)``.
        curves: Branch outputs there, shape ``(M, X)``.
        total: Their sum f, shape ``(X,)``, drawn black.
        targets: Points ``(x, y)`` of the training data.
        active: Mask of active branches, shape ``(M,)``; only their curves are coloured and named.
        sample_names: Names of the D columns of the heat map.
        title: Title of the figure.

    Returns:
        The figure: curves left, heat map right.

    Raises:
        ValueError: If neither responses nor curves are given, or shapes do not fit.

    Example:
        >>> figure = responses_figure(np.eye(3), x=[0.0, 1.0], curves=np.ones((3, 2)))
        >>> [axes.get_xlabel() for axes in figure.axes[:2]]
        ['x', 'sample']
    """
    if responses is None and curves is None:
        raise ValueError("responses_figure: responses or curves must be given, got neither")
    if (x is None) != (curves is None):
        raise ValueError("responses_figure: x and curves must be given together, got one of them")
    figure, grid = panels(2 - (responses is None or curves is None), columns=2, width=4.2, height=3.4, title=title)
    if x is not None and curves is not None:
        _draw_curves(grid[0], x, curves, total=total, targets=targets, active=active)
    if responses is not None:
        matrix = real_array("responses_figure", "responses", responses, "M, D")
        names = names_of("responses_figure", "sample_names", sample_names, matrix.shape[1])
        image = heat_map(grid[-1], matrix, colour_limit(matrix), square=False)
        branch_ticks(grid[-1].yaxis, len(matrix))
        if len(names) <= 20 or sample_names is not None:
            grid[-1].set_xticks(range(len(names)), labels=names)
        grid[-1].set_xlabel("sample")
        grid[-1].set_ylabel("branch")
        colour_bar(figure, image, grid[-1], r"$v_k(x_j)$")
    return figure


def active_silent_figure(
    num_branches: ArrayLike, active: ArrayLike, silent: ArrayLike, *, log2: bool = False, title: str | None = None
) -> Figure:
    """Draw the numbers of active and silent branches against the number of branches.

    Source: the paper, Fig. 4 (right); with ``log2``, Fig. 5.

    Args:
        num_branches: M of each network, shape ``(S,)``.
        active: Number of active branches, or its mean over trials, shape ``(S,)``.
        silent: The same for silent branches.
        log2: Both axes logarithmic with base 2; a count of 0 becomes an open marker at the bottom.
        title: Title of the figure.

    Returns:
        The figure, of one panel.

    Raises:
        ValueError: If shapes differ or a number is negative.

    Example:
        >>> figure = active_silent_figure([2, 4, 8], [2, 3, 3], [0, 1, 5], log2=True)
        >>> figure.axes[0].get_yscale()
        'log'
    """
    branches = real_array("active_silent_figure", "num_branches", num_branches, "S")
    figure, (axes,) = panels(1, columns=1, width=3.8, height=2.9, title=title)
    for name, values, colour, marker in (
        ("active", active, LINE_COLOURS[0], "o"),
        ("silent", silent, LINE_COLOURS[1], "s"),
    ):
        counts = real_array("active_silent_figure", name, values, "S")
        if counts.shape != branches.shape or (counts < 0).any():
            raise ValueError(
                f"active_silent_figure: {name} must be non-negative, of shape {branches.shape}, "
                f"got shape {counts.shape} with minimum {counts.min():g}"
            )
        shown = counts > 0 if log2 else np.full(counts.shape, True)
        axes.plot(branches[shown], counts[shown], label=name, color=colour, marker=marker, markersize=4.5)
        (zeros,) = axes.plot(branches[~shown], np.zeros((~shown).sum()), transform=axes.get_xaxis_transform())
        zeros.set(color=colour, marker=marker, markersize=4.5, linestyle="none", markerfacecolor="white")
        zeros.set(clip_on=False, zorder=5)
    if log2:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(branches.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    axes.set_xlabel("number of branches M")
    axes.set_ylabel("branches")
    _plain(axes)
    axes.legend(frameon=False)
    return figure


def _draw_curves(
    axes: Axes,
    x: ArrayLike,
    curves: ArrayLike,
    *,
    total: ArrayLike | None,
    targets: tuple[ArrayLike, ArrayLike] | None,
    active: ArrayLike | None,
) -> None:
    points = real_array("responses_figure", "x", x, "X")
    lines = real_array("responses_figure", "curves", curves, "M, X")
    if lines.shape[1] != len(points):
        raise ValueError(f"responses_figure: curves must have shape (M, X={len(points)}), got {lines.shape}")
    mask = np.full(len(lines), True) if active is None else np.asarray(active)
    if mask.dtype != bool or mask.shape != (len(lines),):
        raise ValueError(
            f"responses_figure: active must be boolean, of shape ({len(lines)},), got {mask.dtype}, {mask.shape}"
        )
    few = int(mask.sum()) <= len(LINE_COLOURS)
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    for branch in np.flatnonzero(~mask):
        axes.plot(points, lines[branch], color=SILENT_COLOUR, linewidth=0.9, zorder=1)
    for rank, branch in enumerate(np.flatnonzero(mask)):
        colour = LINE_COLOURS[rank % len(LINE_COLOURS)]
        axes.plot(points, lines[branch], color=colour, linewidth=1.6, label=f"$v_{{{branch + 1}}}$" if few else None)
    if active is not None and not mask.all():
        axes.plot([], [], color=SILENT_COLOUR, linewidth=0.9, label=f"{(~mask).sum()} silent")
    if total is not None:
        axes.plot(points, _like(total, points, "total"), color="black", linestyle="--", linewidth=1.3, label="$f$")
    if targets is not None:
        where = real_array("responses_figure", "targets", targets[0], "J")
        values = _like(targets[1], where, "targets")
        axes.plot(where, values, color="black", marker="o", linestyle="none", markersize=5, label="data", zorder=4)
    axes.set_xlabel("x")
    axes.set_ylabel(r"$v_k(x)$")
    _plain(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _like(value: ArrayLike, other: Array, argument: str) -> Array:
    array = real_array("responses_figure", argument, value, "X")
    if array.shape != other.shape:
        raise ValueError(f"responses_figure: {argument} must have shape {other.shape}, got {array.shape}")
    return array


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
