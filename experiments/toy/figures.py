"""Toy figures that :mod:`bsfast.plotting` has no general form of: arrays -> matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from bsfast import plotting

BLUE, ORANGE, GREEN, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#E0AC00", "0.55"


def schematic() -> Figure:
    """Figure 1: x feeds M branches, whose outputs are summed to f."""
    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 4.5), aspect="equal")
    axes.set_axis_off()
    axes.text(0.7, 2.25, "$x$", size=17, ha="center", va="center")
    axes.add_patch(Circle((7.2, 2.25), 0.42, facecolor="white", edgecolor="0.2", linewidth=1.3))
    axes.text(7.2, 2.25, r"$\Sigma$", size=16, ha="center", va="center")
    for y, index, colour in ((3.75, "1", BLUE), (2.65, "2", ORANGE), (0.75, "M", GREEN)):
        box = FancyBboxPatch((2.6, y - 0.38), 2.4, 0.76, boxstyle="round,pad=0.02,rounding_size=0.15")
        box.set(facecolor=colour, alpha=0.16, edgecolor="none")
        axes.add_patch(box)
        outline = FancyBboxPatch((2.6, y - 0.38), 2.4, 0.76, boxstyle="round,pad=0.02,rounding_size=0.15")
        outline.set(facecolor="none", edgecolor=colour, linewidth=1.4)
        axes.add_patch(outline)
        axes.text(3.8, y, rf"branch $v_{{{index}}}(x;\,\theta_{{{index}}})$", size=11, ha="center", va="center")
        _arrow(axes, (1.0, 2.25), (2.55, y))
        bend = 0.42 * np.array([7.2 - 5.05, 2.25 - y]) / np.hypot(7.2 - 5.05, 2.25 - y)
        _arrow(axes, (5.05, y), tuple(np.array([7.2, 2.25]) - bend))
    axes.text(3.8, 1.72, r"$\vdots$", size=15, ha="center", va="center")
    _arrow(axes, (7.62, 2.25), (8.35, 2.25))
    axes.text(8.45, 2.25, r"$f(x)=\sum_{k=1}^{M} v_k(x)$", size=13, ha="left", va="center")
    return figure


def dynamics(paths: Sequence[np.ndarray], x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> Figure:
    """Figure 2: responses of two branches, and their sum, against the step.

    Args:
        paths: Responses at every step, one ``(steps + 1, 2, J)`` a panel.
        x: Samples; a repeated one is drawn once.
        y: Targets.
        names: Stories of the panels, ``"A"`` or ``"B"``.

    Returns:
        One panel a trial, the branch that ends larger on the last sample drawn as branch 2.
    """
    figure = Figure(figsize=(5.0 * len(names) + 0.3, 3.7), layout="constrained")
    colours = dict(zip(sorted(set(x)), (BLUE, GREEN, YELLOW), strict=True))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, path, name in zip(panels, paths, names, strict=True):
        responses = path[:, np.argsort(path[-1, :, -1])]
        for value, colour in colours.items():
            j = list(x).index(value)
            axes.axhline(y[j], color=colour, linewidth=0.7, alpha=0.5)
            axes.plot(responses[:, 0, j], color=colour, linewidth=1.8)
            axes.plot(responses[:, 1, j], color=colour, linewidth=1.8, linestyle=(0, (4, 1.6)))
            axes.plot(responses[:, :, j].sum(axis=1), color=colour, linewidth=1.1, linestyle=":")
        axes.set_title(f"{name}: " + {"A": "one branch for each region", "B": "late take-over and sharing"}[name])
        axes.set_xlabel("step t")
        _plain(axes)
    figure.axes[0].set_ylabel("response")
    lines = [figure.axes[0].plot([], [], color=colour, linewidth=3)[0] for colour in colours.values()]
    styles = [
        figure.axes[0].plot([], [], color="0.2", linestyle=style, linewidth=width)[0]
        for style, width in (("-", 1.8), ((0, (4, 1.6)), 1.8), (":", 1.1))
    ]
    figure.legend(
        [*lines, *styles],
        [*(f"x = {value:g}" for value in colours), "$v_1(x, t)$", "$v_2(x, t)$", "$f(x, t)$"],
        loc="outside lower center",
        ncols=6,
        frameon=False,
    )
    return figure


def success(branches: np.ndarray, rate: np.ndarray, trials: int) -> Figure:
    """Figure 3, left: share of successful trials against M, with its 95% interval."""
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    axes = figure.subplots()
    # Wilson's interval: sensible at a rate of 1 too.
    z = 1.96
    middle = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * np.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    axes.fill_between(branches, middle - half, middle + half, color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(branches, rate, color=BLUE, marker="o", markersize=3.5, label="measured, 95% interval")
    axes.plot(
        branches,
        1 - 2.0 ** (1 - branches),
        color=GREY,
        linestyle="--",
        label="$1-2^{1-M}$: signs of $w_k$ differ at start",
    )
    axes.set(xlabel="number of branches M", ylabel="success rate", ylim=(0.45, 1.02))
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    _plain(axes)
    return figure


def example(
    weight: np.ndarray, bias: np.ndarray, active: np.ndarray, slope: float, x: Sequence[float], y: Sequence[float]
) -> Figure:
    """Figure 4, left and middle: the branches of one network as curves and as response matrix.

    Args:
        weight: Weights, ``(M,)``.
        bias: Biases, ``(M,)``.
        active: Which branches are active, ``(M,)``.
        slope: Slope of LeakyReLU below zero.
        x: Samples.
        y: Targets.

    Returns:
        Curves left, heat map right.
    """
    line = np.linspace(min(x) - 0.2, max(x) + 0.2, 341)
    curves, responses = (np.outer(weight, points) + bias[:, None] for points in (line, x))
    curves, responses = np.maximum(curves, slope * curves), np.maximum(responses, slope * responses)
    return plotting.responses_figure(
        responses,
        x=line,
        curves=curves,
        total=curves.sum(axis=0),
        targets=(x, y),
        active=active,
        sample_names=[f"x={value:g}" for value in x],
    )


def counts(branches: np.ndarray, active: np.ndarray, active_all: np.ndarray) -> Figure:
    """Figure 4, right: mean number of active and silent branches against M, of successful and of all trials."""
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.plot(branches, branches - active, color=ORANGE, marker="s", markersize=3.5, label="silent")
    axes.plot(branches, branches - active_all, color="0.25", linestyle=":", linewidth=1.2)
    axes.plot(branches, active, color=BLUE, marker="o", markersize=3.5, label="active")
    axes.plot(branches, active_all, color="0.25", linestyle=":", linewidth=1.2, label="all trials, failed ones too")
    axes.set(xlabel="number of branches M", ylabel="branches, mean of successful trials")
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def both_rates(branches: np.ndarray, sweeps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw success and active branches of both toys at both learning rates.

    Args:
        branches: Values of M, ``(S,)``.
        sweeps: One a line: ``toy``, its name; ``lr``, the learning rate; ``success`` and ``active``, each ``(S,)``.

    Returns:
        Success left, active branches right.
    """
    figure = Figure(figsize=(8.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for sweep in sweeps:
        first = sweep["toy"] == "Toy1"
        style = {
            "color": BLUE if first else ORANGE,
            "linestyle": "-" if sweep["lr"] < 0.03 else (0, (4, 1.6)),
            "marker": "o" if first else "s",
            "markersize": 3,
            "label": f"{sweep['toy']}, learning rate {sweep['lr']:g}",
        }
        left.plot(branches, sweep["success"], **style)
        right.plot(branches, sweep["active"], **style)
    left.set(xlabel="number of branches M", ylabel="success rate")
    right.set(xlabel="number of branches M", ylabel="active branches of successful trials", ylim=(0, None))
    left.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="0.25", linewidth=1.1))
