"""Generated image files, folders and archives."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image

SIZE = 8


def pixels(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(image, image_format="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def png(seed, size=SIZE):
    return encoded(Image.fromarray(pixels(seed, size)))


def members(splits=("train", "test"), classes=("cat", "dog"), each=3):
    names = [f"{split}/{name}/{index}.png" for split in splits for name in classes for index in range(each)]
    return {name.lstrip("/"): png(seed) for seed, name in enumerate(names)}


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_archive(path, files, *special, mode="w:xz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in special:
            tar.addfile(info)
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def assert_same(one, other):
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    assert one.classes == other.classes
