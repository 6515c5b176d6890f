"""Read a tar archive of class folders in one pass, without extracting it, and keep the decoded images in a cache."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from tqdm import tqdm

from experiments.common.images import Arrays, Collector, decode, is_image

CACHE_VARIABLE = "BSFAST_CACHE"
MAX_MEMBER_BYTES = 64 * 2**20
_CACHE_FORMAT = 1
_END_OF_TAR = bytes(1024)
_OPENERS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\xfd7zXZ\x00": lzma.open,
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
}


def load_archive(path: Path, image_size: int) -> Arrays:
    """Read an archive's images, from the cache if it holds them.

    The cache file is named by the archive's name, size and modification time; one that is damaged is written anew.

    Args:
        path: A ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.xz`` file.
        image_size: Height and width that every image must have, in pixels.

    Returns:
        The image set.
    """
    cache = _cache_file(path, image_size)
    arrays = _read_cache(cache, image_size)
    if arrays is None:
        arrays = read_archive(path, image_size)
        _write_cache(cache, arrays)
    return arrays


def read_archive(path: Path, image_size: int) -> Arrays:
    """Read an archive's images in one pass; nothing is written to disk.

    Members other than images and folders are passed over. The archive is read to its last byte, so that its checksums
    are verified and a truncated copy is found out.

    Args:
        path: A ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.xz`` file.
        image_size: Height and width that every image must have, in pixels.

    Returns:
        The image set.

    Raises:
        ValueError: If the archive is damaged, or a member is a link, a device, lies outside the archive, or is not a
            whole image of the size.
    """
    collector = Collector(f"read_archive: {path.name}")
    last = "its start"
    with (
        path.open("rb") as raw,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"decoding {path.name}", disable=None) as bar,
    ):
        try:
            stream = _Stream(_decompressed(raw))
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    last = member.name
                    _add_member(collector, archive, member, path.name, image_size)
                    bar.update(raw.tell() - bar.n)
            stream.drain()
        except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(
                f"read_archive: {path.name} must be a whole tar archive, got {type(error).__name__} after {last}: "
                f"{error}; fetch it again"
            ) from error
        if stream.tail != _END_OF_TAR:
            raise ValueError(
                f"read_archive: {path.name} must end with a tar end mark, got none after {last}: it is truncated; "
                "fetch it again"
            )
    return collector.arrays()


class _Stream:
    """A readable stream that remembers its last bytes, because tarfile takes a cut between two members for the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tail = b""

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.tail = (self.tail + content)[-len(_END_OF_TAR) :]
        return content

    def drain(self) -> None:
        while self.read(2**20):
            pass


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    magic = raw.read(6)
    raw.seek(0)
    return next((opener(raw) for start, opener in _OPENERS.items() if magic.startswith(start)), raw)


def _add_member(
    collector: Collector, archive: tarfile.TarFile, member: tarfile.TarInfo, source: str, image_size: int
) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise ValueError(f"read_archive: members of {source} must have relative paths inside it, got {member.name!r}")
    if member.isdir():
        collector.add_folder(path)
        return
    if not member.isfile():
        kind = "a link" if member.islnk() or member.issym() else "a device or another special file"
        raise ValueError(f"read_archive: members of {source} must be files or folders, got {kind}: {member.name!r}")
    if not is_image(path):
        return
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(
            f"read_archive: images of {source} must be at most {MAX_MEMBER_BYTES} bytes, got {member.size}: "
            f"{member.name!r}"
        )
    content = archive.extractfile(member).read()
    collector.add(path, decode(content, f"{member.name} in {source}", image_size))


def _cache_file(path: Path, image_size: int) -> Path:
    status = path.stat()
    key = f"{path.name} {status.st_size} {status.st_mtime_ns} {image_size} {_CACHE_FORMAT}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return _cache_folder(path.parent) / f"{path.name.partition('.')[0]}-{digest}.npz"


def _cache_folder(data_folder: Path) -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    beside = data_folder / ".cache"
    writable = os.access(beside if beside.exists() else data_folder, os.W_OK)
    return beside if writable else Path.home() / ".cache" / "bsfast"


def _read_cache(cache: Path, image_size: int) -> Arrays | None:
    if not cache.is_file():
        return None
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = Arrays(*(stored[name] for name in Arrays._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    whole = all(
        images.dtype == np.uint8 and images.shape == (len(labels), 3, image_size, image_size)
        for images, labels in ((arrays.train_images, arrays.train_labels), (arrays.test_images, arrays.test_labels))
    )
    return arrays if whole else None


def _write_cache(cache: Path, arrays: Arrays) -> None:
    partial = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.savez(file, **arrays._asdict())
            partial.replace(cache)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"load_archive: cannot keep the decoded images in {cache.parent} ({error}); they are decoded again next "
            f"time, or set {CACHE_VARIABLE} to a writable folder",
            stacklevel=3,
        )
