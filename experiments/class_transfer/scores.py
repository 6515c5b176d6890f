"""How well parts of images agree with the layers the images are made of, and with each other.

Parts have the shape ``(M, N, 3, H, W)`` and layers ``(L, N, 3, H, W)``; a correlation runs over all pixels of
all images.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bsfast.analysis import active_branches, covariance, offdiag_cosine

_TINY = 1e-30


def correlations(v: Tensor, layers: Tensor) -> Tensor:
    """Absolute correlation of every part with every layer, float64, shape ``(M, L)``."""
    v, layers = _unit(v), _unit(layers)
    return (v @ layers.T).abs()


def matched_mean(table: Tensor) -> float:
    """Mean of the entries of the best one-to-one matching of rows and columns (S1 with :func:`correlations`)."""
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return table[rows, columns].mean().item()


def matched_null(v: Tensor, layers: Tensor, *, draws: int, seed: int = 0) -> Tensor:
    """S1 where the parts of one image are compared with the layers of another.

    Args:
        v: Parts.
        layers: Layers.
        draws: Number of random orders of the images.
        seed: Seed of the orders.

    Returns:
        Values, float64, shape ``(draws,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    count = v.shape[1]
    # Products of all pairs of images at once: an order then picks pairs.
    left, right = (_unit(part).view(len(part), count, -1) for part in (v, layers))
    products = torch.einsum("kip,ljp->klij", left, right)
    images = torch.arange(count)
    orders = [torch.randperm(count, generator=generator) for _ in range(draws)]
    values = [matched_mean(products[:, :, images, order].sum(-1).abs()) for order in orders]
    return torch.tensor(values, dtype=torch.float64)


def grouped_si_sdr(v: Tensor, layers: Tensor) -> float:
    """S2: give each part to the layer it correlates with most, and compare their sum with the layer.

    Args:
        v: Parts.
        layers: Layers.

    Returns:
        Scale-invariant signal-to-distortion ratio in dB, mean over the layers that have a part.

    Source: Le Roux et al. (2019), SDR: half-baked or well done?
    """
    owner = correlations(v, layers).argmax(1)
    ratios = []
    for layer in owner.unique().tolist():
        made, wanted = v[owner == layer].sum(0).double().flatten(), layers[layer].double().flatten()
        target = (made @ wanted) / (wanted @ wanted).clamp(min=_TINY) * wanted
        ratio = target.square().sum() / (made - target).square().sum().clamp(min=_TINY)
        ratios.append(10 * torch.log10(ratio.clamp(min=_TINY)))
    return torch.stack(ratios).mean().item()


def lift(v: Tensor, masks: Tensor) -> float:
    """S4: energy of a part inside a mask over the mask's share of the area; of each part the largest, mean over parts.

    Args:
        v: Parts.
        masks: Bool, shape ``(L, N, H, W)``; empty masks do not count.

    Returns:
        1 where parts ignore the masks.
    """
    energy, masks = v.double().square().sum(2).flatten(1), masks.double().flatten(1)
    area = masks.mean(1)
    inside = energy @ masks[area > 0].T / energy.sum(1, keepdim=True).clamp(min=_TINY)
    return (inside / area[area > 0]).max(1).values.mean().item()


def responses(v: Tensor, without: Iterable[Tensor]) -> Tensor:
    """How much each part of each image changes when a layer is left out, over the part's size.

    Args:
        v: Parts.
        without: Parts of the images without one layer, for each of L layers.

    Returns:
        Float64, shape ``(M, L, N)``.
    """
    changes = torch.stack([_sizes(less - v) for less in without], dim=1)
    return changes / _sizes(v)[:, None].clamp(min=_TINY)


def preference(changes: Tensor) -> float:
    """S5: how much more than the average part a layer's own part responds to its absence.

    Args:
        changes: From :func:`responses`.

    Returns:
        Mean over the best matching of parts and layers; 1 where all parts respond alike.
    """
    mean = changes.mean(2)
    return matched_mean(mean / mean.mean(0).clamp(min=_TINY))


def preference_null(changes: Tensor, *, draws: int, seed: int = 0) -> Tensor:
    """S5 where the parts of each image trade places at random: no part prefers a layer in all images.

    Args:
        changes: From :func:`responses`.
        draws: Number of values.
        seed: Seed of the places.

    Returns:
        Values, float64, shape ``(draws,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    parts, _, count = changes.shape
    values = []
    for _ in range(draws):
        places = torch.rand(parts, 1, count, generator=generator).argsort(0).expand_as(changes)
        values.append(preference(changes.gather(0, places)))
    return torch.tensor(values, dtype=torch.float64)


def redundancy(v: Tensor) -> dict[str, float]:
    """S6: mean absolute cosine between active parts, effective number of parts, and number of active ones.

    Args:
        v: Parts.

    Returns:
        ``cosine``; ``rank``, the exponential of the entropy of the covariance's spectrum; ``active``.
    """
    flat = v.double().flatten(1)
    cov, active = covariance(flat), active_branches(flat)
    spectrum = torch.linalg.eigvalsh(cov).clamp(min=0)
    share = spectrum / spectrum.sum().clamp(min=_TINY)
    return {
        "cosine": offdiag_cosine(cov, active),
        "rank": torch.special.xlogy(share, share).sum().neg().exp().item(),
        "active": float(active.sum()),
    }


def p_value(value: float, null: Tensor) -> float:
    """Share of the null's values, and of the value itself, that are no smaller than the value."""
    return (1 + int((null >= value).sum())) / (1 + len(null))


def _sizes(v: Tensor) -> Tensor:
    return v.flatten(2).double().norm(dim=2)


def _unit(parts: Tensor) -> Tensor:
    flat = parts.double().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=_TINY)
