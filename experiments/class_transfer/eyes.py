"""Segment the eyes of synthetic cats by a run's decomposition, and score it: Figures 12 and 21."""

from __future__ import annotations

import numpy as np
import torch

from experiments.class_transfer import draw
from experiments.class_transfer.augment import to_signal
from experiments.class_transfer.decomposer import Decomposer, decompose_all
from experiments.class_transfer.pictures import reduced
from experiments.class_transfer.segmentation import (
    ComponentSets,
    Segmentation,
    choose_components,
    count_regions,
    dice,
    segment,
)
from experiments.common.record import Run
from experiments.common.synthetic import animals
from experiments.common.synthetic.layered import LayeredImages
from experiments.common.synthetic.sets import FIRST_TEST_INDEX, render_layers

CAT = "cat"
_SHOWN = {"figure-12": slice(0, 4), "figure-21": slice(4, 12)}
_DICE, _PAIRED = 0.6, 0.7


def judge_eyes(
    record: Run, decomposer: Decomposer, *, classes: tuple[str, ...], image_size: int, count: int, seed: int, made: str
) -> None:
    """Choose component sets on training cats, segment test cats, record the metric ``eyes``, a claim and the figures.

    Args:
        record: Gets them.
        decomposer: Trained on SynthAnimals.
        classes: Names of its classes, the cat among them.
        image_size: Height and width in pixels.
        count: Number of cats, for the choice and again for the test.
        seed: Seed of the data.
        made: How the generator was made, for the notes.
    """
    target = torch.full((count,), classes.index(CAT))
    labels = torch.full((count,), animals.CLASSES.index(CAT))

    def parts_of(start: int) -> tuple[LayeredImages, np.ndarray]:
        cats = render_layers("SynthAnimals", count, image_size, seed=seed, start=start, labels=labels)
        return cats, decompose_all(decomposer, to_signal(cats.images), target).v.numpy()

    known, v = parts_of(0)
    chosen = choose_components(v, known.mask("eyes").numpy())
    cats, v = parts_of(FIRST_TEST_INDEX)
    truth = cats.mask("eyes").numpy()
    found = [segment(v[:, index], chosen) for index in range(count)]
    scores = [dice(own.mask, eyes) for own, eyes in zip(found, truth, strict=True)]
    paired = float(np.mean([count_regions(own.mask) == 2 for own in found]))
    record.metric(
        "eyes",
        {"sets": chosen._asdict(), "dice": scores, "median_dice": float(np.median(scores)), "two_regions": paired},
    )
    measured = f"median Dice {np.median(scores):.2f}, two regions in {paired:.0%} of {count} test cats"
    claim = f"components segment eyes: median Dice at least {_DICE:g}, two regions in {_PAIRED:.0%} of the images"
    record.claim("Fig. 12", claim, measured, bool(np.median(scores) >= _DICE and paired >= _PAIRED))
    _draw(record, cats, truth, found, f"{_sentence(chosen)} {made}")


def _sentence(chosen: ComponentSets) -> str:
    signs = [f"{'' if bright else '-'}v{k + 1}" for k, bright in zip(chosen.locating, chosen.bright, strict=True)]
    constant = ", ".join(f"v{k + 1}" for k in chosen.constant)
    return f"Start: {', '.join(signs)} less Otsu's threshold; divided: {constant}; chosen by the eyes of training cats."


def _draw(record: Run, cats: LayeredImages, truth: np.ndarray, found: list[Segmentation], note: str) -> None:
    columns = ["x", "start", "divided", "found", "truth"]
    rows = [
        np.stack([image, _grey(0.5 + own.start), _grey(own.image), _marked(image, own.mask), _marked(image, eyes)])
        for image, own, eyes in zip(cats.images.numpy(), found, truth, strict=True)
    ]
    for name, part in _SHOWN.items():
        if rows[part]:
            title = f"{name.replace('figure-', 'Figure ')}: eyes of synthetic cats"
            data = {"images": reduced(np.stack(rows[part])), "columns": columns, "rows": None}
            record.figure(name, draw.samples, data, title, note)


def _grey(plane: np.ndarray) -> np.ndarray:
    return np.repeat((255 * plane.clip(0, 1)).round().astype(np.uint8)[None], 3, axis=0)


def _marked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Show a mask in red on the image in grey."""
    grey = np.repeat(image.mean(axis=0, keepdims=True).astype(np.uint8), 3, axis=0)
    return np.where(mask, np.array([255, 40, 40], dtype=np.uint8)[:, None, None], grey)
