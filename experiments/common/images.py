"""Labelled images in a tree of class folders: decode each file, check the layout, sort, and split."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})
SPLITS = ("train", "test")
TEST_SHARE = 0.2


class Arrays(NamedTuple):
    """A labelled image set as arrays.

    Attributes:
        train_images: Pixels 0 to 255, uint8, shape ``(N, 3, H, W)``.
        train_labels: Index into ``classes``, int64, shape ``(N,)``.
        test_images: As ``train_images``.
        test_labels: As ``train_labels``.
        classes: Names of the classes, shape ``(C,)``, sorted.
        has_split: Whether train and test were given, shape ``()``; otherwise they were drawn here.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: np.ndarray
    has_split: np.ndarray


def is_image(path: PurePosixPath) -> bool:
    """Tell whether a path is an image by its suffix; hidden files are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def decode(content: bytes, name: str, image_size: int) -> np.ndarray:
    """Decode one image file of a known size.

    The size is checked from the header, before any pixel is decoded.

    Args:
        content: The file's bytes.
        name: What errors call the file.
        image_size: Height and width that the image must have, in pixels.

    Returns:
        RGB pixels, uint8, shape ``(3, H, W)``.

    Raises:
        ValueError: If the file is not a whole image or has another size.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if (width, height) == (image_size, image_size):
                return np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"decode: {name} must be a whole image file, got {type(error).__name__}: {error}") from error
    raise ValueError(
        f"decode: {name} must be {image_size} x {image_size} pixels, got {width} x {height} (width x height)"
    )


class Collector:
    """Gather decoded images by split and class, in any order, and return them sorted by path.

    Args:
        source: What errors call the whole set.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._pixels: list[np.ndarray] = []
        self._keys: list[tuple[str, str, str]] = []
        self._prefix: tuple[str, ...] | None = None
        self._folders: set[tuple[str, ...]] = set()

    def __len__(self) -> int:
        return len(self._keys)

    def add_folder(self, path: PurePosixPath) -> None:
        """Note a folder, so that a class folder without images is found out."""
        self._folders.add(_parts(path))

    def add(self, path: PurePosixPath, pixels: np.ndarray) -> None:
        """Add one image under its path ``[<prefix>/][train|test/]<class>/<file>``.

        Args:
            path: Path inside the set.
            pixels: Shape ``(3, H, W)``, uint8.

        Raises:
            ValueError: If the path does not fit the layout or the paths before it.
        """
        parts = _parts(path)
        split_at = next((index for index, part in enumerate(parts[:-2]) if part in SPLITS), None)
        start = len(parts) - 2 if split_at is None else split_at + 1
        prefix = parts[: max(start, 0)] if split_at is None else (*parts[:split_at], "<split>")
        if len(parts) - start != 2 or start < 0 or prefix != (self._prefix if self._prefix is not None else prefix):
            raise ValueError(
                f"{self.source}: images must lie in <class>/<file>, or all in train/<class>/<file> and "
                f"test/<class>/<file>, got {path}"
            )
        self._prefix = prefix
        self._keys.append(("" if split_at is None else parts[split_at], parts[-2], parts[-1]))
        self._pixels.append(pixels)

    def arrays(self, seed: int = 0) -> Arrays:
        """Sort, label and split what was added.

        Args:
            seed: Seed of the split, used only if the paths have none.

        Returns:
            The image set.

        Raises:
            ValueError: If there is no image, a class folder is empty, or train and test have other classes.
        """
        if not self._keys:
            raise ValueError(f"{self.source}: there must be images in class folders, got none")
        order = sorted(range(len(self._keys)), key=self._keys.__getitem__)
        keys = [self._keys[index] for index in order]
        images = np.stack([self._pixels[index] for index in order])
        classes = sorted({name for _, name, _ in keys})
        self._check_classes(keys, classes)
        labels = np.searchsorted(classes, [name for _, name, _ in keys]).astype(np.int64)
        has_split = bool(keys[0][0])
        in_test = np.array([split == "test" for split, _, _ in keys]) if has_split else _draw_test(labels, seed)
        return Arrays(
            images[~in_test], labels[~in_test], images[in_test], labels[in_test], np.array(classes), np.array(has_split)
        )

    def _check_classes(self, keys: Sequence[tuple[str, str, str]], classes: list[str]) -> None:
        present = {(split, name) for split, name, _ in keys}
        splits = SPLITS if keys[0][0] else ("",)
        expected = {(split, name) for split in splits for name in classes}
        prefix = self._prefix or ()
        for folder in self._folders:
            above = folder[:-1]
            if keys[0][0] and above and above[-1] in SPLITS and above[:-1] == prefix[:-1]:
                expected.add((above[-1], folder[-1]))
            elif not keys[0][0] and above == prefix:
                expected.add(("", folder[-1]))
        missing = sorted("/".join(filter(None, pair)) for pair in expected - present)
        if missing:
            raise ValueError(f"{self.source}: each class folder must hold images, got none in {', '.join(missing)}")


def _parts(path: PurePosixPath) -> tuple[str, ...]:
    return tuple(part for part in path.parts if part != ".")


def _draw_test(labels: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        in_test[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    return in_test
