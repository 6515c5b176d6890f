"""Read a tar archive of class folders in one pass, without extracting it, and keep the decoded images in a cache."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from tqdm import tqdm

from experiments.common.images import Arrays, Collector, decode, is_image

CACHE_VARIABLE = "BSFAST_CACHE"
MAX_MEMBER_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 2**20
# Compressed images expand a few times at most; an archive may always expand to the minimum.
MAX_EXPANSION = 100
MIN_EXPANDED_BYTES = 64 * 2**20
_CACHE_FORMAT = 2
_STALE_SECONDS = 24 * 3600
_END_OF_TAR = bytes(1024)
_OPENERS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\xfd7zXZ\x00": lzma.open,
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
}


def load_archive(path: Path, image_size: int, *, resize: bool = False) -> Arrays:
    """Read an archive's images, from the cache if it holds them.

    The cache file is named by the archive's place, size, times and inode; one that is damaged is written anew, and one
    of the same place before a change is removed.

    Args:
        path: A ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.xz`` file.
        image_size: Height and width that every image must have, in pixels.
        resize: Whether larger images are cut to a square and scaled to that size.

    Returns:
        The image set.

    Raises:
        ValueError: If the archive is damaged, or is not one of class folders with whole images of the size.
    """
    cache = _cache_file(path, image_size, resize=resize)
    arrays = _read_cache(cache, image_size)
    if arrays is None:
        arrays = _decode_archive(path, image_size, resize=resize)
        _write_cache(cache, arrays)
    return arrays


def read_archive(path: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Yield an archive's folders and wanted files in one pass; nothing is written to disk.

    The archive is read to its last byte, so that its checksums are verified and a truncated copy is found out, but no
    further than a set of images would expand.

    Args:
        path: A ``.tar``, ``.tar.gz``, ``.tar.bz2`` or ``.tar.xz`` file.
        wanted: Whether a file of this name is to be read; others are passed over.

    Yields:
        The name of a folder and ``None``, or the name of a file and its bytes.

    Raises:
        ValueError: If the archive is damaged or expands too far, or a member is a link, a device, lies outside the
            archive or is too large.
    """
    last = "its start"
    with (
        path.open("rb") as raw,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"decoding {path.name}", disable=None) as bar,
    ):
        stream = _Stream(raw, path)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    last = member.name
                    stream.next_header = archive.offset
                    name = _check_member(member, path.name)
                    if member.isdir():
                        yield name, None
                    elif wanted(name):
                        yield name, _read_member(archive, member, path.name)
                    # tarfile would keep every header.
                    archive.members.clear()
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
        if stream.end > archive.offset:
            raise ValueError(
                f"read_archive: {path.name} must end after its last member, got more after {last}: a header is "
                "damaged, or two archives are joined; fetch it again"
            )


class _Stream:
    """A readable stream that notes what tarfile takes for the end of an archive, and reads no further than it should.

    Attributes:
        tail: The last bytes read; tarfile takes a cut between two members for the end.
        end: Offset after the last byte that is not zero; tarfile takes a damaged header for the end.
        next_header: Offset at which the header of the next member begins.
    """

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        self._file = _decompressed(raw)
        self._source = path.name
        self._max_bytes = max(MIN_EXPANDED_BYTES, MAX_EXPANSION * path.stat().st_size)
        self._position = 0
        self.tail = b""
        self.end = 0
        self.next_header = 0

    def read(self, size: int) -> bytes:
        if max(self._position, self.next_header) > self._max_bytes:
            raise ValueError(f"read_archive: {self._source} must expand to at most {self._max_bytes} bytes, got more")
        if self._position > self.next_header + MAX_HEADER_BYTES:
            raise ValueError(
                f"read_archive: headers of {self._source} must take at most {MAX_HEADER_BYTES} bytes a member, got more"
            )
        content = self._file.read(size)
        if filled := content.rstrip(b"\0"):
            self.end = self._position + len(filled)
        self._position += len(content)
        self.tail = (self.tail + content)[-len(_END_OF_TAR) :]
        return content

    def drain(self) -> None:
        # No header is expected any more, and padding may be long.
        self.next_header = self._max_bytes
        while self.read(2**20):
            pass


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    magic = raw.read(6)
    raw.seek(0)
    return next((opener(raw) for start, opener in _OPENERS.items() if magic.startswith(start)), raw)


def _check_member(member: tarfile.TarInfo, source: str) -> PurePosixPath:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise ValueError(f"read_archive: members of {source} must have relative paths inside it, got {member.name!r}")
    if not (member.isdir() or member.isfile()):
        kind = "a link" if member.islnk() or member.issym() else "a device or another special file"
        raise ValueError(f"read_archive: members of {source} must be files or folders, got {kind}: {member.name!r}")
    return path


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, source: str) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(
            f"read_archive: files of {source} must be at most {MAX_MEMBER_BYTES} bytes, got {member.size}: "
            f"{member.name!r}"
        )
    return archive.extractfile(member).read()


def _decode_archive(path: Path, image_size: int, *, resize: bool) -> Arrays:
    collector = Collector(f"load_archive: {path.name}")
    for name, content in read_archive(path, is_image):
        if content is None:
            collector.add_folder(name)
        else:
            collector.add(name, decode(content, f"{name} in {path.name}", image_size, resize=resize))
    return collector.arrays()


def _cache_file(path: Path, image_size: int, *, resize: bool = False) -> Path:
    status = path.stat()
    place = _digest(str(path.resolve()), image_size, *(["resized"] if resize else []))
    state = _digest(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, _CACHE_FORMAT)
    return _cache_folder(path.parent) / f"{path.name.partition('.')[0]}-{place}-{state}.npz"


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


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
        _remove_older(cache)
    except OSError as error:
        warnings.warn(
            f"load_archive: cannot keep the decoded images in {cache.parent} ({error}); they are decoded again next "
            f"time, or set {CACHE_VARIABLE} to a writable folder",
            stacklevel=3,
        )


def _remove_older(cache: Path) -> None:
    place = cache.stem.split("-")[-2]
    for old in cache.parent.glob(f"*-{place}-*"):
        # Another process may be writing a partial file that is young.
        is_stale = old.suffix != ".tmp" or time.time() - old.stat().st_mtime > _STALE_SECONDS
        if is_stale and old != cache:
            old.unlink(missing_ok=True)
