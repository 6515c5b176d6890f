"""Figures of what branches say about classes: their outputs, their confidence, their mean logits."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from bsfast.plotting.style import (
    branch_ticks,
    class_axis,
    class_ticks,
    colour_bar,
    colour_limit,
    heat_map,
    names_of,
    panels,
    real_array,
)

# Colour limits of figures with many samples; the few values beyond are drawn in the end colours.
PERCENTILE = 99.5


def branch_outputs_figure(
    outputs: ArrayLike, labels: ArrayLike, class_names: Sequence[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw for every branch an image of its logits, samples ordered by class, on one colour scale.

    Source: the paper, Fig. 6 and Fig. 17 (left).

    Args:
        outputs: Branch logits, shape ``(M, N, C)``.
        labels: True classes, integers of shape ``(N,)``.
        class_names: C names; numbers from 0 by default.
        title: Title of the figure.

    Returns:
        The figure, one panel a branch: x samples, y logits.

    Raises:
        ValueError: If shapes do not fit, or a label or value is out of range.

    Example:
        >>> figure = branch_outputs_figure(np.zeros((2, 3, 2)), [0, 1, 1], ["cat", "dog"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['branch 1', 'branch 2']
    """
    values = real_array("branch_outputs_figure", "outputs", outputs, "M, N, C")
    num_branches, num_samples, num_classes = values.shape
    if np.shape(labels) != (num_samples,):
        raise ValueError(f"branch_outputs_figure: labels must have shape ({num_samples},), got {np.shape(labels)}")
    order, edges, names = class_axis("branch_outputs_figure", labels, class_names, num_classes)
    columns = 1 if num_branches <= 4 else 2 if num_branches <= 16 else 4
    width = {1: 6.0, 2: 4.4, 4: 3.0}[columns]
    figure, grid = panels(num_branches, columns=columns, width=width, height=0.35 + 0.075 * num_classes, title=title)
    limit = colour_limit(values, percentile=PERCENTILE)
    for branch, axes in enumerate(grid):
        image = heat_map(axes, values[branch, order].T, limit, square=False)
        axes.set_title(f"branch {branch + 1}", fontsize=8, pad=2)
        class_ticks(axes, edges, names, labelled=branch + columns >= num_branches)
        axes.set_yticks(range(num_classes), labels=names if branch % columns == 0 else [""] * num_classes)
        axes.tick_params(labelsize=6)
    colour_bar(figure, image, grid, "logit $v_k(x)_c$", clipped=True)
    figure.supxlabel("samples, ordered by class", fontsize=9)
    figure.supylabel("logit of class", fontsize=9)
    return figure


def confidence_figure(
    confidence: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str] | None = None,
    *,
    colour_label: str = "confidence in the true class",
    title: str | None = None,
) -> Figure:
    """Draw each branch's confidence in the true class of each sample, samples ordered by class.

    Source: the paper, Fig. 7.

    Args:
        confidence: As ``bsfast.analysis.confidence`` returns it, shape ``(M, N)``.
        labels: True classes, integers of shape ``(N,)``.
        class_names: Names of the classes; numbers from 0 by default.
        colour_label: Name of the quantity and its unit.
        title: Title of the figure.

    Returns:
        The figure, of one panel: x samples, y branches; yellow is confidence in the true class, blue against it.

    Raises:
        ValueError: If shapes do not fit, or a label or value is out of range.

    Example:
        >>> figure = confidence_figure(np.zeros((3, 4)), [1, 0, 1, 0], ["cat", "dog"])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['cat', 'dog']
    """
    values = real_array("confidence_figure", "confidence", confidence, "M, N")
    if np.shape(labels) != values.shape[1:]:
        raise ValueError(f"confidence_figure: labels must have shape {values.shape[1:]}, got {np.shape(labels)}")
    order, edges, names = class_axis("confidence_figure", labels, class_names, None)
    figure, (axes,) = panels(1, columns=1, width=7.5, height=1.5 + 0.12 * len(values), title=title)
    limit = colour_limit(values, percentile=PERCENTILE)
    image = heat_map(axes, values[:, order], limit, square=False)
    class_ticks(axes, edges, names, labelled=True)
    branch_ticks(axes.yaxis, len(values))
    axes.set_xlabel("samples, ordered by class")
    axes.set_ylabel("branch")
    colour_bar(figure, image, axes, colour_label, clipped=True)
    return figure


def class_summary_figure(
    summary: ArrayLike, class_names: Sequence[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw for every branch its mean logits for each true class, on one colour scale.

    Source: summary of the paper's Fig. 6 and Fig. 17 (left).

    Args:
        summary: As ``bsfast.analysis.class_summary`` returns it, shape ``(M, C, C)`` for (branch, logit, true class).
        class_names: C names; numbers from 0 by default.
        title: Title of the figure.

    Returns:
        The figure, one panel a branch: x true class, y logit.

    Raises:
        ValueError: If shapes do not fit or a value is infinite.

    Example:
        >>> figure = class_summary_figure(np.zeros((2, 3, 3)))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['branch 1', 'branch 2']
    """
    values = real_array("class_summary_figure", "summary", summary, "M, C, C")
    num_branches, num_classes, other = values.shape
    if num_classes != other:
        raise ValueError(f"class_summary_figure: summary must have shape (M, C, C), got {values.shape}")
    names = names_of("class_summary_figure", "class_names", class_names, num_classes)
    columns = 4 if num_branches <= 16 else 8
    figure, grid = panels(num_branches, columns=columns, width=1.6, height=1.6, title=title)
    limit = colour_limit(values)
    for branch, axes in enumerate(grid):
        image = heat_map(axes, values[branch], limit)
        axes.set_title(f"branch {branch + 1}", fontsize=8, pad=2)
        bottom, left = branch + columns >= num_branches, branch % columns == 0
        axes.set_xticks(range(num_classes), labels=names if bottom else [""] * num_classes, rotation=90)
        axes.set_yticks(range(num_classes), labels=names if left else [""] * num_classes)
        axes.tick_params(labelsize=6)
    colour_bar(figure, image, grid, "mean logit")
    figure.supxlabel("true class", fontsize=9)
    figure.supylabel("logit of class", fontsize=9)
    return figure
