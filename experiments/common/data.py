"""Find and load a labelled image set: CIFAR-10 in any of three forms, or scikit-learn's digits when there is none."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.common.archive import load_archive, read_archive
from experiments.common.images import SPLITS, TEST_SHARE, Arrays, Collector, decode, is_image

DATA_VARIABLE = "BSFAST_DATA"
_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_ARCHIVE = "cifar-10-python."
_CIFAR_NAME = re.compile(r"cifar-?10(?!\d)", re.IGNORECASE)
_ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class ImageSet:
    """A labelled image set.

    Attributes:
        name: Short name, such as ``"CIFAR-10"``.
        note: One sentence: where the images are from and how many, for figure notes.
        train_images: Pixels 0 to 255, uint8, shape ``(N, 3, H, W)``.
        train_labels: Index into ``classes``, int64, shape ``(N,)``.
        test_images: As ``train_images``.
        test_labels: As ``train_labels``.
        classes: Names of the classes.
    """

    name: str
    note: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def training_crc(self) -> str:
        """CRC of the training images and labels, for what a checkpoint belongs to."""
        labels = zlib.crc32(self.train_labels.numpy().tobytes())
        return f"CRC of the training images {zlib.crc32(self.train_images.numpy().tobytes(), labels):08x}"


def random_subset(dataset: ImageSet, setup: Any) -> ImageSet:
    """Take as many images as a run's setup asks for, at random from its seed.

    Args:
        dataset: All images.
        setup: Has ``train_images``, ``test_images`` and ``seed``; of images, None is all.

    Returns:
        The image set.

    Raises:
        ValueError: If there are fewer.
    """
    chosen = {}
    for part in ("train", "test"):
        images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
        wanted = getattr(setup, f"{part}_images")
        wanted = len(images) if wanted is None else wanted
        if not 1 <= wanted <= len(images):
            raise ValueError(
                f"random_subset: {part}_images must be in 1 to {len(images)} for {dataset.name}, got {wanted}"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(setup.seed))[:wanted]
        chosen |= {f"{part}_images": images[order], f"{part}_labels": labels[order]}
    return replace(dataset, **chosen)


def find_dataset(image_size: int = 32) -> ImageSet:
    """Load CIFAR-10 from the data folder if it is there, scikit-learn's digits otherwise.

    The data folder is named by the environment variable ``BSFAST_DATA`` (default ``./data``). In it are looked for, in
    this order: ``cifar-10-batches-py``; class folders under ``train`` and ``test`` or ``val``; an archive
    ``*cifar10*.tar*``; class folders without split. The folders may also lie inside a folder ``*cifar10*``; CIFAR10 may
    be written with a hyphen and in capitals. ``BSFAST_DATA`` may also name one of these itself, under any name; class
    folders without split that lie in ``./data`` itself are taken only so.

    Args:
        image_size: Height and width of the images, in pixels.

    Returns:
        The image set; its ``note`` says which was taken.

    Raises:
        FileNotFoundError: If ``BSFAST_DATA`` is set and does not exist, or none of these is there.
    """
    named = os.environ.get(DATA_VARIABLE)
    folder = Path(named or "data").absolute()
    if named and not folder.exists():
        raise FileNotFoundError(f"find_dataset: {DATA_VARIABLE} must name an existing folder or archive, got {named!r}")
    found = _find(folder, is_named=bool(named))
    if found is not None:
        return load_dataset(found, image_size)
    if named:
        raise FileNotFoundError(
            f"find_dataset: {DATA_VARIABLE} must name or hold {_CIFAR_FOLDER}, images in train/<class> and "
            f"test/<class>, images in <class>, or an archive *cifar10*.tar*, got none of these in {named!r}; "
            "unset it to take scikit-learn's digits"
        )
    return load_digits(image_size)


def load_dataset(path: Path | str, image_size: int = 32, *, resize: bool = False) -> ImageSet:
    """Load the image set at a path.

    Args:
        path: ``cifar-10-batches-py``, the folder that holds it, or the official archive ``cifar-10-python.tar.gz``; a
            folder ``train/<class>/*`` and ``test/<class>/*`` (or ``val/<class>/*``), or ``<class>/*`` (a fixed fifth of
            each class becomes the test set); or a tar archive of such a folder.
        image_size: Height and width that every image must have, in pixels.
        resize: Whether larger images are cut to a square and scaled to that size.

    Returns:
        The image set.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If what is there is not an image set, is damaged, or has images of another size.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_dataset: path must be an existing folder or archive, got {str(path)!r}")
    path = path.absolute()
    if path.is_file():
        if not path.name.endswith(_ARCHIVE_SUFFIXES):
            raise ValueError(
                f"load_dataset: path must be a folder or end with {', '.join(_ARCHIVE_SUFFIXES)}, got {path.name!r}"
            )
        if path.name.startswith(_CIFAR_ARCHIVE):
            return _load_cifar_archive(path, image_size)
        return _image_set(load_archive(path, image_size, resize=resize), path.name)
    if path.name == _CIFAR_FOLDER:
        return _load_cifar(path.parent, image_size)
    if (path / _CIFAR_FOLDER).is_dir():
        return _load_cifar(path, image_size)
    return _image_set(_read_folder(path, image_size, resize=resize), path.name)


def load_digits(image_size: int = 32) -> ImageSet:
    """Load scikit-learn's handwritten digits, enlarged from 8 x 8 by nearest neighbour, three equal channels.

    Every fifth of the 1797 images is in the test set.

    Args:
        image_size: Height and width of the images, in pixels.

    Returns:
        The image set.
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    nearest = np.arange(image_size) * 8 // image_size
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, nearest][:, :, nearest]
    images = np.repeat(gray[:, None], 3, axis=1)
    labels = digits.target.astype(np.int64)
    in_test = np.arange(len(labels)) % 5 == 0
    classes = np.array([str(digit) for digit in range(10)])
    arrays = Arrays(images[~in_test], labels[~in_test], images[in_test], labels[in_test], classes, np.array(True))
    note = (
        f"scikit-learn's digits (8 x 8, enlarged to {image_size} x {image_size}), {np.sum(~in_test)} training and "
        f"{np.sum(in_test)} test images, because no CIFAR-10 was found; set {DATA_VARIABLE} to its folder"
    )
    return _to_tensors(arrays, "digits", note)


def _find(folder: Path, *, is_named: bool) -> Path | None:
    if not folder.is_dir():
        return folder if folder.is_file() else None
    candidates = [folder, *sorted(entry for entry in folder.iterdir() if _CIFAR_NAME.search(entry.name))]
    found = (path for fits in (_holds_batches, _holds_splits, _is_archive) for path in candidates if fits(path))
    # ./data, which nobody named, may hold any pictures.
    classes = (path for path in candidates[0 if is_named else 1 :] if _holds_classes(path))
    return next(itertools.chain(found, classes), None)


def _holds_batches(path: Path) -> bool:
    return path.is_dir() and (path.name == _CIFAR_FOLDER or (path / _CIFAR_FOLDER).is_dir())


def _holds_splits(path: Path) -> bool:
    return (path / "train").is_dir()


def _is_archive(path: Path) -> bool:
    return path.is_file() and path.name.endswith(_ARCHIVE_SUFFIXES)


def _holds_classes(path: Path) -> bool:
    return any(is_image(PurePosixPath(*file.parts[-2:])) for file in path.glob("*/*"))


def _load_cifar(root: Path, image_size: int, source: str = _CIFAR_FOLDER) -> ImageSet:
    from experiments.common.torchvision_import import import_torchvision

    if image_size != 32:
        raise ValueError(f"load_dataset: image_size must be 32 for {source}, got {image_size}")
    datasets = import_torchvision().datasets
    try:
        train, test = (datasets.CIFAR10(str(root), train=is_train, download=False) for is_train in (True, False))
    except RuntimeError as error:
        raise ValueError(f"load_dataset: {source} must be whole, got: {error}") from error
    images = [np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test)]
    labels = [np.array(part.targets, dtype=np.int64) for part in (train, test)]
    arrays = Arrays(images[0], labels[0], images[1], labels[1], np.array(train.classes), np.array(True))
    return _image_set(arrays, source)


def _load_cifar_archive(path: Path, image_size: int) -> ImageSet:
    # Its members are pickles: torchvision verifies the MD5 sum of each before it loads any.
    from experiments.common.torchvision_import import import_torchvision

    cifar = import_torchvision().datasets.CIFAR10
    batches = {name for name, _ in (*cifar.train_list, *cifar.test_list)} | {cifar.meta["filename"]}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / _CIFAR_FOLDER
        target.mkdir()
        for name, content in read_archive(path, lambda name: name.name in batches):
            if content is not None:
                (target / name.name).write_bytes(content)
        return _load_cifar(target.parent, image_size, path.name)


def _read_folder(folder: Path, image_size: int, *, resize: bool) -> Arrays:
    def name(entry: Path) -> PurePosixPath:
        return PurePosixPath(entry.relative_to(folder).as_posix())

    collector = Collector(f"load_dataset: {folder.name}")
    roots = [folder / split for split in SPLITS if (folder / split).is_dir()] or [folder]
    for class_folder in (entry for root in roots for entry in root.iterdir() if entry.is_dir()):
        collector.add_folder(name(class_folder))
    entries = sorted(entry for root in roots for entry in root.glob("*/**/*"))
    files = [entry for entry in entries if is_image(name(entry)) and entry.is_file()]
    for file in tqdm(files, desc=f"decoding {folder.name}", disable=None):
        collector.add(name(file), decode(file.read_bytes(), str(name(file)), image_size, resize=resize))
    return collector.arrays()


def _image_set(arrays: Arrays, source: str) -> ImageSet:
    counts = f"{len(arrays.train_labels):,} training and {len(arrays.test_labels):,} test images"
    split = (
        "" if arrays.has_split else f"; the source has no split, a fixed {TEST_SHARE:.0%} of each class is the test set"
    )
    is_cifar = _CIFAR_NAME.search(source)
    jpeg = ", as JPEG files (with their artefacts)" if is_cifar and "jpeg" in source.lower() else ""
    name = "CIFAR-10" if is_cifar else source.partition(".")[0]
    return _to_tensors(arrays, name, f"{name}{jpeg} from {source}, {counts}{split}")


def _to_tensors(arrays: Arrays, name: str, note: str) -> ImageSet:
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays[:4])
    return ImageSet(name, note, *tensors, classes=tuple(str(label) for label in arrays.classes))
