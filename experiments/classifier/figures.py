"""Draw the classifier's figures: the paper's Figures 5 (left, middle) and 6, and the course of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from bsfast import analysis, plotting
from experiments.common.training import History


def counts_figure(counts: Mapping[int, tuple[int, int]]) -> Figure:
    """Draw the numbers of active and silent branches of models of several M: Figure 5, left.

    Args:
        counts: M to (active, silent).

    Returns:
        The figure.
    """
    sizes = sorted(counts)
    active, silent = zip(*(counts[size] for size in sizes), strict=True)
    return plotting.active_silent_figure(sizes, active, silent, log2=True)


def covariances_figure(initial: Tensor, trained: Tensor) -> Figure:
    """Draw the covariance of the branches before and after training, each on its own scale: Figure 5, middle.

    Args:
        initial: Branch outputs before training, shape ``(M, N, C)``.
        trained: The same after training.

    Returns:
        The figure.
    """
    matrices, titles = [], []
    for name, outputs in (("initial", initial), ("trained", trained)):
        cov = analysis.covariance(analysis.response_matrix(outputs))
        matrices.append((cov / outputs.shape[1]).numpy())
        titles.append(f"{name}, off-diagonal ratio {analysis.offdiag_ratio(cov):.3f}")
    figure = plotting.covariance_figure(matrices, titles=titles, shared_scale=False)
    figure.set_size_inches(8.6, 3.6)
    return figure


def outputs_figure(outputs: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Draw an image of the outputs of every branch: Figure 6.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.
        classes: C names.

    Returns:
        The figure.
    """
    return plotting.branch_outputs_figure(outputs.numpy(), labels.numpy(), list(classes))


def summary_figure(outputs: Tensor, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Draw the mean logits of every branch for each true class: Figure 6 in brief.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.
        classes: C names.

    Returns:
        The figure.
    """
    return plotting.class_summary_figure(analysis.class_summary(outputs, labels).numpy(), list(classes))


def training_figure(histories: Mapping[int, History], floor: float) -> Figure:
    """Draw loss above its floor and accuracy on the training images against the epoch.

    Args:
        histories: M to what happened.
        floor: Smallest possible loss, in nats.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    shades = np.linspace(0.15, 0.85, max(len(histories), 2))
    for shade, (size, history) in zip(shades, sorted(histories.items()), strict=False):
        epochs = np.arange(1, len(history.loss) + 1)
        style = {"label": f"M={size}", "color": (0.0, 0.25 + 0.5 * (1 - shade), 0.7 * shade + 0.3), "marker": "o"}
        axes[0].plot(epochs, np.array(history.loss) - floor, markersize=3, **style)
        axes[1].plot(epochs, 100 * np.array(history.accuracy), markersize=3, **style)
    axes[0].set_ylabel("training loss above its floor (nats)")
    axes[1].set_ylabel("training accuracy (%)")
    for panel in axes:
        panel.set_xlabel("epoch")
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(frameon=False)
    return figure
