"""The images of a class-transfer run: synthetic ones, classes of CIFAR-10, or a folder or archive of class folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.class_transfer.setup import Setup
from experiments.common.data import DATA_VARIABLE, ImageSet, find_dataset, load_dataset, random_subset
from experiments.common.synthetic.sets import SETS, synthetic_set

CIFAR = "CIFAR-10"
CAT = "cat"
_CIFAR_CLASSES = (CAT, "dog", "horse")
_MOST_PHOTOGRAPHS = 8


class Photographs(NamedTuple):
    """Pictures of cats.

    Attributes:
        images: Pixels, uint8, shape ``(N, 3, H, W)``.
        note: What they are, for figure notes.
    """

    images: Tensor
    note: str


def load(setup: Setup) -> ImageSet:
    """Load or render the images.

    Args:
        setup: Which, how many and how large.

    Returns:
        The image set.

    Raises:
        FileNotFoundError: If there is nothing at the path, or no CIFAR-10.
        ValueError: If what is there does not fit, or there are fewer images than asked for.
    """
    if setup.data in SETS:
        counts = {"train_images": setup.train_images, "test_images": setup.test_images}
        dataset = synthetic_set(setup.data, setup.image_size, seed=setup.seed, **counts)
        return _of_classes(dataset, setup.classes)
    if setup.data == CIFAR:
        dataset = find_dataset(setup.image_size)
        if dataset.name != CIFAR:
            raise FileNotFoundError(f"load: {DATA_VARIABLE} must name {CIFAR} or the folder that holds it, got none")
    else:
        dataset = load_dataset(Path(setup.data), setup.image_size, resize=True)
        note = f"{dataset.note}, cut and scaled to {setup.image_size} x {setup.image_size} where larger"
        dataset = replace(dataset, note=note)
    chosen = _CIFAR_CLASSES if setup.classes is None and dataset.name == CIFAR else setup.classes
    return random_subset(_of_classes(dataset, chosen), setup)


def load_photographs(setup: Setup) -> Photographs | None:
    """Load the cats that a run segments as pictures, at most 8, those of the test set first.

    Args:
        setup: Where they are, and how large they become.

    Returns:
        The pictures, or None if the setup names none.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If what is there is no image set with cats.
    """
    if setup.photographs is None:
        return None
    dataset = _of_classes(load_dataset(Path(setup.photographs), setup.image_size, resize=True), (CAT,))
    images = torch.cat([dataset.test_images, dataset.train_images])[:_MOST_PHOTOGRAPHS]
    return Photographs(images, f"Cats of {dataset.name}, cut and scaled to {setup.image_size} x {setup.image_size}")


def named_by_environment() -> str:
    """Return what the environment variable ``BSFAST_DATA`` names.

    Returns:
        An absolute path.

    Raises:
        ValueError: If it is not set.
    """
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        raise ValueError(
            f"--data, or {DATA_VARIABLE}, must name a folder or archive of class folders for the budget paper, got "
            "neither; or take --data animals or faces"
        )
    return str(Path(named).resolve())


def _of_classes(dataset: ImageSet, classes: Sequence[str] | None) -> ImageSet:
    """Take the images of some classes, which are numbered anew in the order given."""
    if classes is None:
        return dataset
    unknown = [name for name in classes if name not in dataset.classes]
    if unknown or len(set(classes)) != len(classes):
        raise ValueError(
            f"load: classes must be different ones of {', '.join(dataset.classes)}, got {', '.join(classes)}"
        )
    chosen = {}
    for part in ("train", "test"):
        images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
        number = torch.full((len(dataset.classes),), -1)
        for index, name in enumerate(classes):
            number[dataset.classes.index(name)] = index
        kept = number[labels] >= 0
        chosen |= {f"{part}_images": images[kept], f"{part}_labels": number[labels[kept]]}
    note = f"{dataset.note}; of them the classes {', '.join(classes)}"
    return replace(dataset, note=note, classes=tuple(classes), **chosen)
