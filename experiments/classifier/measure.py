"""Numbers behind the classifier's figures: informative branches, rankings, parts of Figure 7, equilibrium."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from bsfast import analysis
from experiments.classifier.loss import sum_gradient
from experiments.classifier.model import SlimResNet18
from experiments.common.augment import normalise

_FITTED = 1e-3  # norm of dL/df below which a sample counts as fitted
_NO_RESPONSE = 1e-3  # norm of a Jacobian, relative to the root mean square, below which it counts as zero
_ORTHOGONAL = 0.05  # absolute cosine below which two vectors count as orthogonal


def sample_of_each_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose samples at random, the same number of each class where there are enough.

    Args:
        labels: True classes, shape ``(N,)``.
        count: Samples of each class.
        seed: Seed of the choice.

    Returns:
        Indices, ordered by class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[labels[order] == label][:count] for label in labels.unique()]
    return torch.cat(chosen)


def most_informative(outputs: Tensor, labels: Tensor, classes: Sequence[int], count: int = 2) -> list[int]:
    """Find the branches that vary most over the samples of some classes.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.
        classes: Whose samples count.
        count: Number of branches.

    Returns:
        Branches by falling norm of their centred responses.
    """
    own = outputs[:, torch.isin(labels, torch.tensor(classes))]
    norms = (own - own.mean(1, keepdim=True)).flatten(1).norm(dim=1)
    return norms.argsort(descending=True)[:count].tolist()


class Ranking(NamedTuple):
    """Two branches' opinions of the samples of one class.

    Attributes:
        tops: Indices of the samples each is surest of, surest first.
        overlap: Number of samples in both.
        spearman: Rank correlation of their confidences over all samples of the class.
    """

    tops: tuple[list[int], list[int]]
    overlap: int
    spearman: float


def rank(outputs: Tensor, labels: Tensor, label: int, pair: Sequence[int], count: int) -> Ranking:
    """Rank the samples of a class by the confidence of two branches.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.
        label: The class.
        pair: Two branches.
        count: Samples at the top.

    Returns:
        The ranking.
    """
    own = (labels == label).nonzero()[:, 0]
    confidence = outputs[list(pair)][:, own, label]
    tops = [own[row.argsort(descending=True)[:count]].tolist() for row in confidence]
    return Ranking((tops[0], tops[1]), len(set(tops[0]) & set(tops[1])), _spearman(confidence[0], confidence[1]))


def inter_class_pairs(outputs: Tensor, labels: Tensor) -> int:
    """Count pairs (branch, class) whose mean confidence is over 2 pooled deviations from that of another class.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.

    Returns:
        The count, at most M C.
    """
    confidence = analysis.confidence(outputs, labels)
    present = [confidence[:, labels == label] for label in labels.unique() if (labels == label).sum() > 1]
    mean = torch.stack([own.mean(1) for own in present], 1)
    variance = torch.stack([own.var(1) for own in present], 1)
    pooled = ((variance[:, :, None] + variance[:, None, :]) / 2).sqrt()
    far = (mean[:, :, None] - mean[:, None, :]).abs() > 2 * pooled
    return int(far.any(2).sum())


def intra_class_classes(outputs: Tensor, labels: Tensor) -> list[int]:
    """Find the classes within which two active branches rank samples differently: rank correlation below 0.5.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.

    Returns:
        The classes.
    """
    active = analysis.active_branches(outputs).nonzero()[:, 0].tolist()
    found = []
    for label in labels.unique().tolist():
        confidence = outputs[active][:, labels == label, label]
        if len(active) > 1 and confidence.shape[1] > 2:
            correlations = [
                _spearman(confidence[k], confidence[l])
                for k in range(len(active))
                for l in range(k)  # noqa: E741
            ]
            if any(correlation < 0.5 for correlation in correlations):  # a NaN is no disagreement
                found.append(label)
    return found


def equilibrium(
    branches: Sequence[nn.Module], images: Tensor, labels: Tensor, *, clamp: str, batch_size: int = 100
) -> dict[str, float | list[float]]:
    r"""Measure why the gradient of each stem weight is small where it is: the paper's section 8.

    The gradient of sample x for branch k is :math:`J_k^\top g`, with :math:`g = dL/df` ("collaborative") and the
    Jacobian :math:`J_k = \partial v_k / \partial w` of one stem weight w, a vector over the classes ("distributive").
    For each pair (w, x) of an unfitted sample the product is small because :math:`J_k` is (norm below 1e-3 of its root
    mean square over all branches), or because the two are orthogonal (cosine below 0.05).

    Args:
        branches: M slim ResNets on the CPU; run in eval mode.
        images: Pixels, uint8, shape ``(N, 3, H, W)``.
        labels: True classes, shape ``(N,)``.
        clamp: Of the loss.
        batch_size: Images at a time.

    Returns:
        ``gradient_norm`` (mean over samples), ``fitted_samples`` (share with norm of g below 1e-3), and for each branch
        over pairs (w, x) of the other samples ``distributive_zero`` and ``orthogonal``, shares.
    """
    f = torch.stack([_outputs(branch, images, batch_size) for branch in branches]).sum(0)
    g = sum_gradient(f, labels, clamp=clamp)
    norms = g.norm(dim=1)
    unfitted = norms >= _FITTED
    result: dict[str, float | list[float]] = {
        "gradient_norm": norms.mean().item(),
        "fitted_samples": 1 - unfitted.float().mean().item(),
    }
    images, g = images[unfitted], g[unfitted]
    # Per branch and stem weight: squared norm of the Jacobian's column over the classes, and its product with g.
    squares, products = zip(*(_stem_columns(branch, images, g, batch_size) for branch in branches), strict=True)
    size, product = torch.stack(squares).sqrt(), torch.stack(products)
    zero = size < _NO_RESPONSE * size.square().mean().sqrt()
    cosine = product / (size * g.norm(dim=1)[:, None]).clamp(min=1e-30)
    result["distributive_zero"] = zero.float().mean((1, 2)).tolist()
    result["orthogonal"] = (~zero & (cosine.abs() < _ORTHOGONAL)).float().mean((1, 2)).tolist()
    return result


def _outputs(branch: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    branch.eval()
    with torch.no_grad():
        return torch.cat([branch(normalise(batch)) for batch in images.split(batch_size)])


def _stem_columns(branch: SlimResNet18, images: Tensor, g: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Of the Jacobian for each stem weight: squared norm over the classes, and product with g; both ``(N, P)``."""
    branch.eval()
    squares, products = [], []
    for batch, factor in zip(images.split(batch_size), g.split(batch_size), strict=True):
        x = normalise(batch)
        patches = nn.functional.unfold(x, 3, padding=1)
        stem = branch.conv1(x).detach().requires_grad_()
        v = branch.from_stem(stem)
        square = product = torch.zeros(())
        for c in range(v.shape[1]):
            (grad,) = torch.autograd.grad(v[:, c].sum(), stem, retain_graph=c + 1 < v.shape[1])
            column = torch.einsum("nop,nip->noi", grad.flatten(2), patches).flatten(1)
            square, product = square + column.square(), product + column * factor[:, c, None]
        squares.append(square)
        products.append(product)
    return torch.cat(squares), torch.cat(products)


def _spearman(a: Tensor, b: Tensor) -> float:
    if a.min() == a.max() or b.min() == b.max():
        return float("nan")
    return float(spearmanr(a.numpy(), b.numpy()).statistic)
