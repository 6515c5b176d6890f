"""Draw Hessians: arrays -> matplotlib Figure, without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

_DECADES = 6.0


def hessian_maps(magnitudes: Sequence[np.ndarray], titles: Sequence[str], num_branches: int) -> Figure:
    """Draw log10 |H| of all branches side by side on one colour scale: Figure 5, right.

    Args:
        magnitudes: Means of |H| over cells, each of shape ``(cells, cells)``, branch-major.
        titles: One a map.
        num_branches: M.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(5.2 * len(magnitudes), 4.6), layout="constrained")
    top = np.log10(max(float(np.max(own)) for own in magnitudes) or 1.0)
    panels = figure.subplots(1, len(magnitudes), squeeze=False)[0]
    for axes, own, title in zip(panels, magnitudes, titles, strict=True):
        drawn = np.log10(np.maximum(own, 10 ** (top - _DECADES)))
        image = axes.imshow(drawn, cmap="magma", vmin=top - _DECADES, vmax=top, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        step = len(own) / num_branches
        shown = range(0, num_branches, max(1, num_branches // 8))
        axes.set_xticks([(k + 0.5) * step - 0.5 for k in shown], [str(k + 1) for k in shown])
        axes.set_yticks([(k + 0.5) * step - 0.5 for k in shown], [str(k + 1) for k in shown])
        axes.set_xlabel("branch")
    panels[0].set_ylabel("branch")
    figure.colorbar(image, ax=list(panels), label="log10 of mean |H|", shrink=0.9)
    return figure


def interaction_maps(kappas: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """Draw the coherence of every pair of branches.

    Args:
        kappas: Coherences, each of shape ``(M, M)``.
        titles: One a map.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(4.6 * len(kappas), 4.0), layout="constrained")
    panels = figure.subplots(1, len(kappas), squeeze=False)[0]
    for axes, own, title in zip(panels, kappas, titles, strict=True):
        image = axes.imshow(own, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        shown = range(0, len(own), max(1, len(own) // 8))
        axes.set_xticks(list(shown), [str(k + 1) for k in shown])
        axes.set_yticks(list(shown), [str(k + 1) for k in shown])
        axes.set_xlabel("branch")
    panels[0].set_ylabel("branch")
    figure.colorbar(image, ax=list(panels), label="coherence", shrink=0.9)
    return figure


def spectra(eigenvalues: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """Draw the eigenvalues of every branch's own block of the first layer, the largest first.

    Args:
        eigenvalues: Descending, each of shape ``(M, P)``.
        titles: One a time.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(4.6 * len(eigenvalues), 3.4), layout="constrained")
    panels = figure.subplots(1, len(eigenvalues), squeeze=False, sharey=True)[0]
    top = max(float(np.max(own)) for own in eigenvalues) or 1.0
    for axes, own, title in zip(panels, eigenvalues, titles, strict=True):
        for k, row in enumerate(own):
            shade = k / max(len(own) - 1, 1)
            axes.plot(
                np.arange(1, len(row) + 1), np.maximum(row, top * 1e-9), color=(0.1, 0.25 + 0.5 * shade, 0.8), lw=0.8
            )
        axes.set(xscale="log", yscale="log", xlabel="number of the eigenvalue")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("eigenvalue")
    return figure


def densities(grids: Sequence[np.ndarray], values: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """Draw the spectral density of every whole branch.

    Args:
        grids: Eigenvalues, each of shape ``(M, G)``.
        values: Densities, likewise.
        titles: One a time.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(4.6 * len(grids), 3.4), layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, grid, density, title in zip(panels, grids, values, titles, strict=True):
        for k, (x, y) in enumerate(zip(grid, density, strict=True)):
            shade = k / max(len(grid) - 1, 1)
            axes.plot(x, np.maximum(y, 1e-7 * np.max(y)), color=(0.1, 0.25 + 0.5 * shade, 0.8), lw=0.8)
        axes.set(yscale="log", xlabel="eigenvalue")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("density")
    return figure


def gradient_zeros(
    distributive: Sequence[np.ndarray], orthogonal: Sequence[np.ndarray], titles: Sequence[str]
) -> Figure:
    """Draw why the product of the two factors of the gradient is small: section 8.

    Args:
        distributive: Share of pairs (weight, sample) whose Jacobian vanishes, each of shape ``(M,)``.
        orthogonal: Share of those whose factors are orthogonal, likewise.
        titles: One a time.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(4.6 * len(titles), 3.2), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    for axes, zero, right_angle, title in zip(panels, distributive, orthogonal, titles, strict=True):
        branches = np.arange(1, len(zero) + 1)
        axes.bar(branches, 100 * zero, label="branch does not answer", color="#3b5b92")
        axes.bar(branches, 100 * right_angle, bottom=100 * zero, label="orthogonal to what is missing", color="#d08a3c")
        axes.set(ylim=(0, 100), xlabel="branch")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("pairs (weight, sample), %")
    panels[-1].legend(frameon=False, fontsize=8)
    return figure
