"""Measure what branches do for each class or region: shares of energy, confidence, mean logits."""

import math

import torch
from torch import Tensor

from bsfast.analysis.check import check_labels, check_real, check_tensor, shape_of


def region_energy(outputs: Tensor, labels: Tensor, *, num_regions: int | None = None) -> Tensor:
    r"""Sum each branch's squared output over each class, or over each region of pixels.

    :math:`E_{kr} = \sum_{j: r_j = r} \|v_k(x_j)\|^2`.

    Source: the paper's notion of a branch's responsibility for a class (Figs. 6, 7); the numerator of P.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)`` or ``(M, N, C, *space)``.
        labels: Class of each sample, integers of shape ``(N,)``, or region of each pixel, ``(N, *space)``.
        num_regions: R; the largest label plus one if None.

    Returns:
        Energies, shape ``(M, R)``, in squared units of the output; 0 for a region without samples.

    Raises:
        ValueError: If shapes do not fit or a label is outside [0, R).

    Example:
        >>> outputs = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
        >>> region_energy(outputs, torch.tensor([0, 1]))
        tensor([[1., 4.],
                [9., 0.]])
    """
    check_real("region_energy", "outputs", outputs)
    if outputs.dim() < 3:
        raise ValueError(f"region_energy: outputs must have shape (M, N, C, ...), got {shape_of(outputs)}")
    check_tensor("region_energy", "labels", labels)
    by_sample = labels.dim() == 1
    pixels = (outputs.shape[1],) if by_sample else (outputs.shape[1], *outputs.shape[3:])
    regions = check_labels("region_energy", labels, pixels, outputs.device, num_regions)
    energy = (outputs.square().flatten(2) if by_sample else outputs.square()).sum(2).flatten(1)
    flat = labels.flatten()
    return torch.stack([energy[:, flat == region].sum(1) for region in range(regions)], dim=1)


def energy_shares(energy: Tensor) -> Tensor:
    r"""Divide each branch's energy among the regions: :math:`P_{kr} = E_{kr} / \sum_s E_{ks}`.

    Source: Eastwood & Williams (2018), A framework for the quantitative evaluation of disentangled representations,
        with energy for importance.

    Args:
        energy: As :func:`region_energy` returns it, shape ``(M, R)``.

    Returns:
        Shares P, shape ``(M, R)``; rows sum to 1, and are NaN for a branch without energy.

    Raises:
        ValueError: If ``energy`` is not a matrix or has a negative entry.

    Example:
        >>> energy_shares(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [1.0000, 0.0000]])
    """  # noqa: DOC502
    _check_energy("energy_shares", energy)
    return energy / energy.sum(1, keepdim=True)


def selectivity(energy: Tensor) -> Tensor:
    r"""Score how few regions each branch serves: :math:`1 - H(P_{k\cdot}) / \log R`.

    Source: Eastwood & Williams (2018), "disentanglement" (section 2), with energy for importance.

    Args:
        energy: As :func:`region_energy` returns it, shape ``(M, R)``.

    Returns:
        Scores, shape ``(M,)``: 1 if all energy is in one region, 0 for equal shares; NaN for a branch without energy or
        with one region.

    Raises:
        ValueError: If ``energy`` is not a matrix or has a negative entry.

    Example:
        >>> selectivity(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([1., 0.])
    """  # noqa: DOC502
    _check_energy("selectivity", energy)
    return _concentration(energy)


def completeness(energy: Tensor) -> Tensor:
    r"""Score how few branches serve each region: :math:`1 - H(E_{\cdot r} / \sum_k E_{kr}) / \log M`.

    Source: Eastwood & Williams (2018), "completeness" (section 2), with energy for importance.

    Args:
        energy: As :func:`region_energy` returns it, shape ``(M, R)``.

    Returns:
        Scores, shape ``(R,)``: 1 if one branch has all the energy of a region, 0 for equal shares; NaN for a region
        without energy or with one branch.

    Raises:
        ValueError: If ``energy`` is not a matrix or has a negative entry.

    Example:
        >>> completeness(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        tensor([1., 0.])
    """  # noqa: DOC502
    _check_energy("completeness", energy)
    return _concentration(energy.T)


def confidence(outputs: Tensor, labels: Tensor, *, kind: str = "logit") -> Tensor:
    r"""Take from each branch its vote for the true class y of each sample.

    Source: the paper, Fig. 7 (``"logit"``).

    Args:
        outputs: Branch logits before any clamp, shape ``(M, N, C)``.
        labels: True classes, integers of shape ``(N,)``.
        kind: ``"logit"`` for :math:`v_{ky}`; ``"centred"`` for :math:`v_{ky} - \mathrm{mean}_c v_{kc}`, which a
            constant added to all logits does not change; ``"margin"`` for :math:`v_{ky} - \max_{c \ne y} v_{kc}`.

    Returns:
        Confidences in units of a logit, shape ``(M, N)``: positive for the true class, negative against it.

    Raises:
        ValueError: If ``kind`` is unknown, shapes do not fit, a label is outside [0, C), or C = 1 with ``"margin"``.

    Example:
        >>> outputs = torch.tensor([[[1.0, 3.0, -1.0]]])
        >>> [confidence(outputs, torch.tensor([1]), kind=kind).item() for kind in ("logit", "centred", "margin")]
        [3.0, 2.0, 2.0]
    """
    check_real("confidence", "outputs", outputs)
    if kind not in {"logit", "centred", "margin"}:
        raise ValueError(f"confidence: kind must be 'logit', 'centred' or 'margin', got {kind!r}")
    if outputs.dim() != 3:
        raise ValueError(f"confidence: outputs must have shape (M, N, C), got {shape_of(outputs)}")
    if kind == "margin" and outputs.shape[2] < 2:
        raise ValueError(f"confidence: outputs must have at least two classes for a margin, got {shape_of(outputs)}")
    check_labels("confidence", labels, outputs.shape[1:2], outputs.device, outputs.shape[2])
    index = labels.long()[None, :, None].expand(outputs.shape[0], -1, 1)
    true = outputs.gather(2, index)[:, :, 0]
    if kind == "centred":
        return true - outputs.mean(2)
    if kind == "margin":
        return true - outputs.scatter(2, index, -math.inf).amax(2)
    return true


def class_summary(outputs: Tensor, labels: Tensor) -> Tensor:
    r"""Average each branch's logits over the samples of each class.

    :math:`A_k[c, y] = \mathrm{mean}_{j: y_j = y}\, v_k(x_j)_c`. Where the classification works, every column of
    :math:`\sum_k A_k` has its maximum on the diagonal.

    Source: summary of the paper's Fig. 6 and Fig. 17 (left).

    Args:
        outputs: Branch logits, shape ``(M, N, C)``.
        labels: True classes, integers of shape ``(N,)``.

    Returns:
        Means A, shape ``(M, C, C)`` for (branch, logit, true class); NaN in the column of a class without samples.

    Raises:
        ValueError: If shapes do not fit or a label is outside [0, C).

    Example:
        >>> outputs = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]])
        >>> class_summary(outputs, torch.tensor([0, 0, 1]))
        tensor([[[2., 0.],
                 [0., 5.]]])
    """
    check_real("class_summary", "outputs", outputs)
    if outputs.dim() != 3:
        raise ValueError(f"class_summary: outputs must have shape (M, N, C), got {shape_of(outputs)}")
    num_classes = outputs.shape[2]
    check_labels("class_summary", labels, outputs.shape[1:2], outputs.device, num_classes)
    return torch.stack([outputs[:, labels == label].mean(1) for label in range(num_classes)], dim=2)


def _check_energy(function: str, energy: Tensor) -> None:
    check_real(function, "energy", energy)
    if energy.dim() != 2 or (energy < 0).any():
        found = f"{shape_of(energy)} with minimum {energy.min().item():g}"
        raise ValueError(f"{function}: energy must be non-negative of shape (M, R), got {found}")


def _concentration(energy: Tensor) -> Tensor:
    """One minus the normalised entropy of the shares of every row."""
    entropy: Tensor = torch.special.entr(energy_shares(energy)).sum(1)
    return (1 - entropy / math.log(energy.shape[1])).clamp(0, 1)
