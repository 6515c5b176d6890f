"""Sets of synthetic images: SynthAnimals and SynthFaces, with their layers or as a labelled image set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.common.data import ImageSet
from experiments.common.synthetic import animals, faces
from experiments.common.synthetic.layered import Canvas, LayeredImages
from experiments.common.synthetic.raster import Draws

# Each module has CLASSES, LAYERS, NOISE_PLANES and paint.
SETS: dict[str, ModuleType] = {"SynthAnimals": animals, "SynthFaces": faces}
FIRST_TEST_INDEX = 6 * 2**40  # no training set gets that far; of the first class
_AT_ONCE = 32  # larger parts do not fit the caches; measured at 64 pixels


def render_layers(
    name: str,
    count: int,
    size: int,
    *,
    seed: int = 0,
    start: int = 0,
    labels: Tensor | None = None,
    omit: Iterable[str] = (),
) -> LayeredImages:
    """Render images with their layers.

    An image depends on the seed, its index, its label and the size only. With another label it is the same scene as an
    animal or face of another class; without a layer it is the same but for that layer.

    Args:
        name: Of :data:`SETS`.
        count: Number of images, at least 1.
        size: Height and width in pixels, a power of 2 from 16.
        seed: Seed of the set.
        start: Index of the first image; test images begin at :data:`FIRST_TEST_INDEX`.
        labels: Class of each image, int64, shape ``(count,)``; by default the classes alternate.
        omit: Names of layers to leave out, any but the first.

    Returns:
        The images and their layers.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> made = render_layers("SynthAnimals", 3, 16)
        >>> bool((made.layers.sum(1) == made.images).all())
        True
    """
    omit = tuple(omit)
    _check(name, count, size, labels, omit)
    parts = list(_parts(name, range(start, start + count), size, seed, labels, omit))
    joined = (torch.cat([getattr(part, field) for part in parts]) for field in ("images", "layers", "masks", "labels"))
    return LayeredImages(*joined, names=parts[0].names, classes=parts[0].classes)


def synthetic_set(name: str, size: int, *, train_images: int, test_images: int, seed: int = 0) -> ImageSet:
    """Render a labelled image set.

    Args:
        name: Of :data:`SETS`.
        size: Height and width in pixels, a power of 2 from 16.
        train_images: Number of training images, at least 1.
        test_images: Number of test images, at least 1.
        seed: Seed of the set.

    Returns:
        The image set; its classes are as frequent as each other.

    Raises:
        ValueError: If an argument is not as described.
    """
    tensors = []
    for count, start in ((train_images, 0), (test_images, FIRST_TEST_INDEX)):
        _check(name, count, size, None, ())
        parts = list(_parts(name, range(start, start + count), size, seed, None, (), progress=f"rendering {name}"))
        tensors += [torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])]
    note = f"{name}, {train_images:,} training and {test_images:,} test images of {size} x {size} pixels, seed {seed}"
    return ImageSet(name, note, *tensors, classes=SETS[name].CLASSES)


def _parts(
    name: str,
    indices: Sequence[int],
    size: int,
    seed: int,
    labels: Tensor | None,
    omit: tuple[str, ...],
    *,
    progress: str | None = None,
) -> Iterator[LayeredImages]:
    if labels is None:
        labels = torch.tensor(indices) % len(SETS[name].CLASSES)
    for first in tqdm(range(0, len(indices), _AT_ONCE), desc=progress, disable=None if progress else True):
        own = slice(first, first + _AT_ONCE)
        canvas = Canvas(frozenset(omit))
        SETS[name].paint(canvas, Draws(seed, indices[own], size, SETS[name].NOISE_PLANES), labels[own], size)
        yield canvas.finish(labels[own], SETS[name].CLASSES)


def _check(name: str, count: int, size: int, labels: Tensor | None, omit: tuple[str, ...]) -> None:
    if name not in SETS:
        raise ValueError(f"render_layers: name must be one of {', '.join(SETS)}, got {name!r}")
    if count < 1:
        raise ValueError(f"render_layers: there must be at least 1 image, got {count}")
    if size < 16 or size & (size - 1):
        raise ValueError(f"render_layers: size must be a power of 2 from 16, got {size}")
    classes = len(SETS[name].CLASSES)
    if labels is not None and (labels.shape != (count,) or labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"render_layers: labels must be {count} classes in 0 to {classes - 1}, got {labels.tolist()}")
    painted = SETS[name].LAYERS[1:]  # on the first, which cannot be left out
    unknown = sorted(set(omit) - set(painted))
    if unknown:
        raise ValueError(f"render_layers: omit must be of {', '.join(painted)}, got {', '.join(unknown)}")
