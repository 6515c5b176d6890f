"""Find and load a labelled image set: CIFAR-10 in any of three forms, or scikit-learn's digits when there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.common.archive import load_archive
from experiments.common.images import TEST_SHARE, Arrays, Collector, decode, is_image

DATA_VARIABLE = "BSFAST_DATA"
_CIFAR_FOLDER = "cifar-10-batches-py"
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


def find_dataset(image_size: int = 32) -> ImageSet:
    """Load CIFAR-10 from the data folder if it is there, scikit-learn's digits otherwise.

    The data folder is named by the environment variable ``BSFAST_DATA`` (default ``./data``). In it are looked for, in
    this order: ``cifar-10-batches-py``; class folders under ``train`` and ``test``, also inside a folder ``cifar*``;
    an archive ``cifar*.tar*``. ``BSFAST_DATA`` may also name one of these itself.

    Args:
        image_size: Height and width of the images, in pixels.

    Returns:
        The image set; its ``note`` says which was taken.

    Raises:
        FileNotFoundError: If ``BSFAST_DATA`` is set and does not exist.
    """
    named = os.environ.get(DATA_VARIABLE)
    folder = Path(named or "data")
    if named and not folder.exists():
        raise FileNotFoundError(f"find_dataset: {DATA_VARIABLE} must name an existing folder or archive, got {named!r}")
    found = _find(folder)
    return load_digits(image_size) if found is None else load_dataset(found, image_size)


def load_dataset(path: Path | str, image_size: int = 32) -> ImageSet:
    """Load the image set at a path.

    Args:
        path: ``cifar-10-batches-py`` or the folder that holds it; a folder ``train/<class>/*`` and ``test/<class>/*``,
            or ``<class>/*`` (a fixed fifth of each class becomes the test set); or a tar archive of such a folder.
        image_size: Height and width that every image must have, in pixels.

    Returns:
        The image set.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If what is there is not an image set, is damaged, or has images of another size.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_dataset: path must be an existing folder or archive, got {str(path)!r}")
    if path.is_file():
        if not path.name.endswith(_ARCHIVE_SUFFIXES):
            raise ValueError(
                f"load_dataset: path must be a folder or end with {', '.join(_ARCHIVE_SUFFIXES)}, got {path.name!r}"
            )
        return _image_set(load_archive(path, image_size), path.name)
    if path.name == _CIFAR_FOLDER:
        return _load_cifar(path.parent, image_size)
    if (path / _CIFAR_FOLDER).is_dir():
        return _load_cifar(path, image_size)
    return _image_set(_read_folder(path, image_size), path.name)


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


def _find(folder: Path) -> Path | None:
    if folder.is_file() or folder.name == _CIFAR_FOLDER:
        return folder
    for candidate in (folder, *sorted(folder.glob("cifar*"))):
        if candidate.is_dir() and ((candidate / _CIFAR_FOLDER).is_dir() or candidate.name == _CIFAR_FOLDER):
            return candidate
    for candidate in (folder, *sorted(folder.glob("cifar*"))):
        if (candidate / "train").is_dir():
            return candidate
    archives = (entry for entry in sorted(folder.glob("cifar*")) if entry.name.endswith(_ARCHIVE_SUFFIXES))
    return next(archives, None)


def _load_cifar(root: Path, image_size: int) -> ImageSet:
    from experiments.common.torchvision_import import import_torchvision

    if image_size != 32:
        raise ValueError(f"load_dataset: image_size must be 32 for {_CIFAR_FOLDER}, got {image_size}")
    datasets = import_torchvision().datasets
    try:
        train, test = (datasets.CIFAR10(str(root), train=is_train, download=False) for is_train in (True, False))
    except RuntimeError as error:
        raise ValueError(f"load_dataset: {_CIFAR_FOLDER} must be whole, got: {error}") from error
    images = [np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test)]
    labels = [np.array(part.targets, dtype=np.int64) for part in (train, test)]
    arrays = Arrays(images[0], labels[0], images[1], labels[1], np.array(train.classes), np.array(True))
    return _image_set(arrays, _CIFAR_FOLDER)


def _read_folder(folder: Path, image_size: int) -> Arrays:
    collector = Collector(f"load_dataset: {folder.name}")
    splits = [folder / "train", folder / "test"]
    roots = splits if splits[0].is_dir() or splits[1].is_dir() else [folder]
    missing = [root.name for root in roots if not root.is_dir()]
    if missing:
        raise ValueError(f"load_dataset: {folder.name} must have both train and test, got no {missing[0]}")
    entries = sorted(entry for root in roots for entry in root.glob("*/**/*") if not entry.name.startswith("."))
    for class_folder in (entry for root in roots for entry in root.iterdir() if not entry.name.startswith(".")):
        if class_folder.is_dir():
            collector.add_folder(PurePosixPath(class_folder.relative_to(folder).as_posix()))
    files = [entry for entry in entries if is_image(PurePosixPath(entry.name)) and entry.is_file()]
    for file in tqdm(files, desc=f"decoding {folder.name}", disable=None):
        name = PurePosixPath(file.relative_to(folder).as_posix())
        collector.add(name, decode(file.read_bytes(), str(name), image_size))
    return collector.arrays()


def _image_set(arrays: Arrays, source: str) -> ImageSet:
    counts = f"{len(arrays.train_labels):,} training and {len(arrays.test_labels):,} test images"
    split = (
        "" if arrays.has_split else f"; the source has no split, a fixed {TEST_SHARE:.0%} of each class is the test set"
    )
    is_cifar = source == _CIFAR_FOLDER or "cifar" in source.lower()
    jpeg = ", as JPEG files (with their artefacts)" if is_cifar and "jpeg" in source.lower() else ""
    name = "CIFAR-10" if is_cifar else source.partition(".")[0]
    return _to_tensors(arrays, name, f"{name}{jpeg} from {source}, {counts}{split}")


def _to_tensors(arrays: Arrays, name: str, note: str) -> ImageSet:
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays[:4])
    return ImageSet(name, note, *tensors, classes=tuple(str(label) for label in arrays.classes))
