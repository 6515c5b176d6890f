"""Segment the eyes of synthetic cats by a run's decomposition, and score it: Figures 12 and 21."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments.class_transfer import draw
from experiments.class_transfer.augment import to_signal
from experiments.class_transfer.data import CAT, Photographs
from experiments.class_transfer.decomposer import Decomposer, decompose_all
from experiments.class_transfer.pictures import reduced
from experiments.common.images import decode
from experiments.common.record import Run
from experiments.common.synthetic import animals
from experiments.common.synthetic.layered import LayeredImages
from experiments.common.synthetic.sets import FIRST_TEST_INDEX, render_layers
from experiments.segmentation.components import ComponentSets, Segmentation, choose_components, segment
from experiments.segmentation.regions import count_regions, dice, roc_area

_SHOWN = {"figure-12": slice(0, 4), "figure-21": slice(4, 12)}
_KNOWN = 48  # cats whose eyes choose the component sets
_DICE, _PAIRED = 0.6, 0.7
_FIRST_TEST_CAT = FIRST_TEST_INDEX + 100_000  # those before were in sight when the procedure was settled


def judge_eyes(
    record: Run,
    decomposer: Decomposer,
    *,
    classes: tuple[str, ...],
    image_size: int,
    count: int,
    seed: int,
    made: str,
    photographs: Photographs | None = None,
) -> None:
    """Choose component sets on training cats, segment test cats, record the metric ``eyes``, a claim and the figures.

    The true layers of the images, as parts with sets of their own, show how far the procedure gets at most.

    Args:
        record: Gets them.
        decomposer: Trained on SynthAnimals.
        classes: Names of its classes, the cat among them.
        image_size: Height and width in pixels.
        count: Number of test cats, and at most of those for the choice, which are 48.
        seed: Seed of the data.
        made: How the generator was made, for the notes.
        photographs: Cats to segment as pictures; None is scikit-image's, where that package is installed.
    """

    def parts_of(images: torch.Tensor) -> np.ndarray:
        target = torch.full((len(images),), classes.index(CAT))
        return decompose_all(decomposer, to_signal(images), target).v.numpy()

    known = _cats(min(count, _KNOWN), image_size, seed, start=0)
    cats = _cats(count, image_size, seed, start=_FIRST_TEST_CAT)
    truth = cats.mask("eyes").numpy()
    chosen, found, score = _score(parts_of(known.images), known, parts_of(cats.images), cats)
    _, _, layers = _score(_layers(known), known, _layers(cats), cats)
    record.metric("eyes", score | {"true_layers": layers})
    median, paired = score["median_dice"], score["two_regions"]
    measured = (
        f"median Dice {median:.2f}, two regions in {paired:.0%} of {count} test cats; area under the ROC curve of the "
        f"start {score['located']:.2f}; the true layers as components: {layers['median_dice']:.2f}, "
        f"{layers['two_regions']:.0%}"
    )
    claim = f"components segment eyes: median Dice at least {_DICE:g}, two regions in {_PAIRED:.0%} of the images"
    record.claim("Fig. 12", claim, measured, median >= _DICE and paired >= _PAIRED)
    note = f"{_sentence(chosen)} {made}"
    for name, part in _SHOWN.items():
        if len(images := cats.images[part].numpy()):
            own = Segmentation(*(field[part] for field in found))
            _draw(record, name, "eyes of synthetic cats", images, own, note, truth=truth[part])
    if (shown := photographs or _scikit_image_cat(image_size)) is not None:
        own = segment(parts_of(shown.images), chosen)
        what = f"{shown.note}; the generator has not seen the like."
        _draw(record, "figure-12-photographs", "photographs", shown.images.numpy(), own, f"{what} {note}")


def _score(
    known_parts: np.ndarray, known: LayeredImages, parts: np.ndarray, cats: LayeredImages
) -> tuple[ComponentSets, Segmentation, dict[str, Any]]:
    """Choose on the known cats, segment the others; their scores in the form of the metric."""
    chosen = choose_components(known_parts, known.mask("eyes").numpy())
    truth, found = cats.mask("eyes").numpy(), segment(parts, chosen)
    scores = [dice(mask, eyes) for mask, eyes in zip(found.mask, truth, strict=True)]
    return (
        chosen,
        found,
        {
            "sets": chosen._asdict(),
            "dice": scores,
            "median_dice": float(np.median(scores)),
            "two_regions": float(np.mean([count_regions(mask) == 2 for mask in found.mask])),
            "located": roc_area(found.start, truth),
        },
    )


def _layers(cats: LayeredImages) -> np.ndarray:
    return cats.signals().transpose(0, 1).numpy()


def _cats(count: int, image_size: int, seed: int, *, start: int) -> LayeredImages:
    labels = torch.full((count,), animals.CLASSES.index(CAT))
    return render_layers("SynthAnimals", count, image_size, seed=seed, start=start, labels=labels)


def _scikit_image_cat(image_size: int) -> Photographs | None:
    try:
        from skimage.data import chelsea
    except ImportError:
        return None
    content = io.BytesIO()
    Image.fromarray(chelsea()).save(content, "PNG")
    image = decode(content.getvalue(), "scikit-image's cat", image_size, resize=True)
    return Photographs(torch.tensor(image)[None], "The cat photograph of scikit-image")


def _sentence(chosen: ComponentSets) -> str:
    return (
        f"Start: {', '.join(chosen.locating)} less a threshold, and less 3 outside of a pair; divided: "
        f"{', '.join(chosen.constant)} (|v|: magnitude, -: turned over; smoothed); weights: boundary {chosen.mu:g}, "
        f"inside {chosen.lambda1:g}, outside 1; {chosen.steps} steps; chosen on training cats whose eyes are known."
    )


def _draw(
    record: Run,
    name: str,
    what: str,
    images: np.ndarray,
    found: Segmentation,
    note: str,
    *,
    truth: np.ndarray | None = None,
) -> None:
    columns = ["x", "start", "divided", "found", *(["truth"] if truth is not None else [])]
    rows = [
        [image, _grey(0.5 + start), _grey(divided), _marked(image, mask)]
        for image, mask, start, divided in zip(images, *found, strict=True)
    ]
    if truth is not None:
        rows = [[*row, _marked(image, eyes)] for row, image, eyes in zip(rows, images, truth, strict=True)]
    title = f"{name.replace('figure-', 'Figure ').partition('-')[0]}: {what}"
    record.figure(
        name, draw.samples, {"images": reduced(np.array(rows)), "columns": columns, "rows": None}, title, note
    )


def _grey(plane: np.ndarray) -> np.ndarray:
    return np.repeat((255 * plane.clip(0, 1)).round().astype(np.uint8)[None], 3, axis=0)


def _marked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Show a mask in red on the image in grey."""
    grey = np.repeat(image.mean(axis=0, keepdims=True).astype(np.uint8), 3, axis=0)
    return np.where(mask, np.array([255, 40, 40], dtype=np.uint8)[:, None, None], grey)
