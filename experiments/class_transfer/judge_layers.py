"""Score the branches of a run on synthetic data against the layers of the images, next to baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bsfast.analysis import completeness, selectivity
from experiments.class_transfer import scores
from experiments.class_transfer.augment import to_signal
from experiments.class_transfer.baselines import independent_parts, laplacian_bands, principal_parts
from experiments.class_transfer.decomposer import Decomposer, decompose_all
from experiments.common.gaussian import gaussian_smooth
from experiments.common.record import Run
from experiments.common.synthetic.layered import LayeredImages
from experiments.common.synthetic.sets import FIRST_TEST_INDEX, SETS, render_layers

_FITTED = 6  # times as many images for principal and independent components
_DRAWS = 200
_LIKELY = 0.01


def judge_layers(
    record: Run,
    trained: Decomposer,
    untrained: Decomposer,
    *,
    data: str,
    classes: tuple[str, ...],
    image_size: int,
    count: int,
    sigma: float,
    seed: int,
) -> None:
    """Record the metric ``scores`` and the claims about it.

    Args:
        record: Gets them.
        trained: The run's generator.
        untrained: One of the same architecture as it is before training.
        data: Name of a synthetic set.
        classes: Names of the generator's classes.
        image_size: Height and width in pixels.
        count: Number of images.
        sigma: Deviation of the Gaussian, in pixels, that leaves what the linear baselines take from the image.
        seed: Seed of the data.
    """
    known = SETS[data].CLASSES
    branches = trained.branches.num_branches
    target = torch.arange(count) % len(classes)
    labels = torch.tensor([known.index(name) for name in classes])[target]

    def render(*omit: str) -> LayeredImages:
        return render_layers(data, count, image_size, seed=seed, start=FIRST_TEST_INDEX, labels=labels, omit=omit)

    made = render()
    x = to_signal(made.images)
    # The first layer is what the others are painted on, and cannot be left out.
    without = [to_signal(render(name).images) for name in made.names[1:]]
    parts = decompose_all(trained, x, target)
    wanted = _fine_layers(made.signals().transpose(0, 1), parts.R, sigma if not trained.smoother.splits else None)
    known_images = to_signal(render_layers(data, max(_FITTED * count, 4 * branches), image_size, seed=seed).images)
    smooth = _gaussian(sigma)
    fine = known_images - smooth(known_images)
    contestants: dict[str, Callable[[Tensor], Tensor]] = {
        "trained branches": lambda images: decompose_all(trained, images, target).v,
        "random branches": lambda images: decompose_all(untrained, images, target).v,
        "Laplacian bands": laplacian_bands(branches, sigma),
        "PCA": principal_parts(fine, branches, smooth),
        "ICA": independent_parts(fine, branches, smooth),
    }
    table = {
        name: _scores(decompose(x), (decompose(images) for images in without), wanted, made.masks)
        for name, decompose in contestants.items()
    }
    record.metric("scores", {"layers": made.names, "images": count, "contestants": table})
    _claim(record, table["trained branches"], table["random branches"])


def _fine_layers(layers: Tensor, R: Tensor, sigma: float | None) -> Tensor:
    """Layers less what R has of them: their Gaussian where R is one, else their least-squares part along R."""
    if sigma is not None:
        return layers - gaussian_smooth(layers, sigma)
    amounts = (layers * R).flatten(1).sum(1) / R.square().sum()
    return layers - amounts.view(-1, 1, 1, 1, 1) * R


def _gaussian(sigma: float) -> Callable[[Tensor], Tensor]:
    return lambda images: gaussian_smooth(images, sigma)


def _scores(v: Tensor, without: Iterable[Tensor], layers: Tensor, masks: Tensor) -> dict[str, float]:
    table = scores.correlations(v, layers)
    matched, null = scores.matched_mean(table), scores.matched_null(v, layers, draws=_DRAWS)
    changes = scores.responses(v, without)
    preferred, preferred_null = scores.preference(changes), scores.preference_null(changes, draws=_DRAWS)
    return {
        "S1": matched,
        "S1 null": null.mean().item(),
        "S1 z": ((matched - null.mean()) / null.std().clamp(min=1e-12)).item(),
        "S1 p": scores.p_value(matched, null),
        "S2 dB": scores.grouped_si_sdr(v, layers),
        "S3 selectivity": selectivity(table.square()).nanmean().item(),
        "S3 completeness": completeness(table.square()).nanmean().item(),
        "S4": scores.lift(v, masks.transpose(0, 1)),
        "S5": preferred,
        "S5 null": preferred_null.mean().item(),
        "S5 p": scores.p_value(preferred, preferred_null),
        **{f"S6 {name}": value for name, value in scores.redundancy(v).items()},
    }


def _claim(record: Run, trained: dict[str, Any], random: dict[str, Any]) -> None:
    for name, what in (("S1", "agree with the layers"), ("S5", "each respond to the absence of a layer of their own")):
        likely, value, start = trained[f"{name} p"], trained[name], random[name]
        measured = f"{name} {value:.3f}, p {likely:.3f}; random branches {start:.3f}"
        claim = f"branches {what}: {name} above the permutation null at p < {_LIKELY:g} and above random branches"
        record.claim("layers", claim, measured, likely < _LIKELY and value > start)
