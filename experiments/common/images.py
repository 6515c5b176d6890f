"""Labelled images in a tree of class folders: decode each file, check the layout, sort, and split."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr")
SPLITS = ("train", "test", "val")
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
    """Tell whether a path is an image by its suffix; hidden files, and files in hidden folders, are not."""
    return path.suffix.lower() in SUFFIXES and not _is_hidden(path)


def decode(content: bytes, name: str, image_size: int, *, resize: bool = False) -> np.ndarray:
    """Decode one image file of a known size, or of any.

    Format, size and mode are checked from the header, before any pixel is decoded. Transparency is dropped; more than
    eight bits a channel are refused, since Pillow would clip them.

    Args:
        content: The file's bytes.
        name: What errors call the file.
        image_size: Height and width that the image must have, in pixels.
        resize: Whether an image of another size has its largest central square scaled to that size, by Lanczos' filter;
            one that is smaller is refused.

    Returns:
        RGB pixels, uint8, shape ``(3, H, W)``.

    Raises:
        ValueError: If the file is not a whole image of :data:`FORMATS` and :data:`MODES`, or its size is refused.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                (width, height), mode = image.size, image.mode
                if (width, height) == (image_size, image_size) and mode in MODES:
                    return np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
                if resize and min(width, height) >= image_size and mode in MODES:
                    return _resized(image, image_size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"decode: {name} must be a whole image file, got {type(error).__name__}: {error}") from error
    if mode not in MODES:
        raise ValueError(f"decode: {name} must have one of the modes {', '.join(MODES)}, got {mode}")
    wanted = f"at least {image_size} x {image_size}" if resize else f"{image_size} x {image_size}"
    raise ValueError(f"decode: {name} must be {wanted} pixels, got {width} x {height} (width x height)")


class Collector:
    """Gather decoded images by split and class, in any order, and return them sorted by path.

    ``val`` is the test set where there is no ``test``, and is passed over otherwise. Hidden folders are passed over.

    Args:
        source: What errors call the whole set.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._pixels: dict[tuple[str, str, str], np.ndarray] = {}
        self._prefix: tuple[str, ...] | None = None
        self._folders: set[tuple[str, ...]] = set()

    def __len__(self) -> int:
        return len(self._pixels)

    def add_folder(self, path: PurePosixPath) -> None:
        """Note a folder, so that a class folder without images is found out."""
        if path.parts and not _is_hidden(path):
            self._folders.add(path.parts)

    def add(self, path: PurePosixPath, pixels: np.ndarray) -> None:
        """Add one image under its path ``[<prefix>/][train|test|val/]<class>/<file>``.

        Args:
            path: Path inside the set.
            pixels: Shape ``(3, H, W)``, uint8.

        Raises:
            ValueError: If the path does not fit the layout or the paths before it, or was given before.
        """
        parts = path.parts
        split_at = next((index for index, part in enumerate(parts[:-2]) if part in SPLITS), None)
        start = len(parts) - 2 if split_at is None else split_at + 1
        prefix = parts[: max(start, 0)] if split_at is None else (*parts[:split_at], "<split>")
        if len(parts) - start != 2 or start < 0 or prefix != (self._prefix if self._prefix is not None else prefix):
            raise ValueError(
                f"{self.source}: images must lie in <class>/<file>, or all in train/<class>/<file> and "
                f"test/<class>/<file>, got {path}"
            )
        self._prefix = prefix
        key = ("" if split_at is None else parts[split_at], parts[-2], parts[-1])
        if key in self._pixels:
            raise ValueError(f"{self.source}: each image must be given once, got {path} twice")
        self._pixels[key] = pixels

    def arrays(self, seed: int = 0) -> Arrays:
        """Sort, label and split what was added.

        Args:
            seed: Seed of the split, used only if the paths have none.

        Returns:
            The image set.

        Raises:
            ValueError: If there is no image, a split is missing, a class folder is empty, or train and test have other
                classes.
        """
        splits = self._splits()
        keys = sorted(key for key in self._pixels if key[0] in splits)
        images = np.stack([self._pixels[key] for key in keys])
        classes = sorted({name for _, name, _ in keys})
        self._check_classes(keys, classes, splits)
        labels = np.searchsorted(classes, [name for _, name, _ in keys]).astype(np.int64)
        has_split = len(splits) > 1
        in_test = np.array([split != "train" for split, _, _ in keys]) if has_split else _draw_test(labels, seed)
        return Arrays(
            images[~in_test], labels[~in_test], images[in_test], labels[in_test], np.array(classes), np.array(has_split)
        )

    def _splits(self) -> tuple[str, ...]:
        given = sorted({split for split, _, _ in self._pixels})
        if not given:
            raise ValueError(f"{self.source}: there must be images in class folders, got none")
        splits = ("",) if given == [""] else ("train", "test" if "test" in given else "val")
        if not set(splits) <= set(given):
            raise ValueError(f"{self.source}: there must be train and test, or train and val, got {', '.join(given)}")
        return splits

    def _check_classes(self, keys: Sequence[tuple[str, str, str]], classes: list[str], splits: tuple[str, ...]) -> None:
        present = {(split, name) for split, name, _ in keys}
        expected = {(split, name) for split in splits for name in classes}
        prefix = self._prefix or ()
        for folder in self._folders:
            above = folder[:-1]
            if above and above[-1] in splits and above[:-1] == prefix[:-1]:
                expected.add((above[-1], folder[-1]))
            elif splits == ("",) and above == prefix:
                expected.add(("", folder[-1]))
        missing = sorted("/".join(filter(None, pair)) for pair in expected - present)
        if missing:
            raise ValueError(f"{self.source}: each class folder must hold images, got none in {', '.join(missing)}")


def _resized(image: Image.Image, image_size: int) -> np.ndarray:
    image.draft("RGB", (2 * image_size, 2 * image_size))  # a JPEG is decoded no larger than needed
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    small = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _draw_test(labels: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        in_test[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    return in_test
