"""Reading archives: the cache, and every way in which an archive can be damaged or a bomb."""

import io
import lzma
import os
import tarfile

import numpy as np
import pytest

from experiments.common import archive, data
from tests.experiments.image_files import (
    SIZE,
    assert_same,
    members,
    png,
    special,
    write_archive,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(archive.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_load_archive_takes_the_cache(tmp_path, cache, monkeypatch):
    path = write_archive(tmp_path / "a.tar.xz", members())
    first = data.load_dataset(path, SIZE)
    assert [file.suffix for file in cache.iterdir()] == [".npz"]
    monkeypatch.setattr(archive, "read_archive", lambda *_: pytest.fail("the archive was read again"))
    assert_same(first, data.load_dataset(path, SIZE))


@pytest.mark.parametrize(
    "damage", [lambda old: old[: len(old) // 2], lambda old: old[:900] + b"?" + old[901:], lambda _: b""]
)
def test_load_archive_rebuilds_a_damaged_cache(tmp_path, cache, damage):
    path = write_archive(tmp_path / "a.tar.xz", members())
    first = data.load_dataset(path, SIZE)
    (stored,) = cache.iterdir()
    whole = stored.read_bytes()
    stored.write_bytes(damage(whole))
    assert_same(first, data.load_dataset(path, SIZE))
    assert len(stored.read_bytes()) == len(whole)
    np.testing.assert_array_equal(np.load(stored)["train_images"], first.train_images.numpy())


def test_load_archive_sees_that_the_archive_changed(tmp_path):
    path = write_archive(tmp_path / "a.tar", members(), mode="w")
    data.load_dataset(path, SIZE)
    write_archive(path, members(classes=("cat", "emu")), mode="w")
    os.utime(path, ns=(1, 1))
    assert data.load_dataset(path, SIZE).classes == ("cat", "emu")


def test_load_archive_tells_archives_of_one_name_size_and_time_apart(tmp_path, cache):
    classes = [("cat", "dog"), ("cat", "emu"), ("ant", "emu")]
    paths = []
    for index, names in enumerate(classes):
        (tmp_path / str(index)).mkdir()
        paths.append(write_archive(tmp_path / str(index) / "a.tar", members(classes=names), mode="w"))
        os.utime(paths[-1], ns=(1, 1))
    assert [data.load_dataset(path, SIZE).classes for path in paths] == classes
    paths[2].replace(paths[0])
    assert data.load_dataset(paths[0], SIZE).classes == classes[2]


def test_load_archive_removes_what_it_cached_of_the_archive_before(tmp_path, cache):
    path = write_archive(tmp_path / "a.tar", members(), mode="w")
    (tmp_path / "other").mkdir()
    data.load_dataset(write_archive(tmp_path / "other" / "a.tar", members(), mode="w"), SIZE)
    data.load_dataset(path, SIZE)
    (old,) = set(cache.iterdir()) - {archive._cache_file(tmp_path / "other" / "a.tar", SIZE)}
    fresh, stale = (old.with_name(f".{old.name}.{pid}.tmp") for pid in (1, 2))
    for partial in (fresh, stale):
        partial.write_bytes(b"")
    os.utime(stale, (1, 1))
    write_archive(path, members(each=4), mode="w")
    data.load_dataset(path, SIZE)
    kept = {archive._cache_file(tmp_path / "other" / "a.tar", SIZE), archive._cache_file(path, SIZE), fresh}
    assert set(cache.iterdir()) == kept


def test_load_archive_works_without_a_writable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(archive.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot keep the decoded images .*set BSFAST_CACHE to a writable folder"):
        assert len(data.load_dataset(write_archive(tmp_path / "a.tar", members(), mode="w"), SIZE).classes) == 2


BAD_MEMBERS = {
    "parent": (special("train/../../x", tarfile.REGTYPE), "relative paths inside it, got 'train/../../x'"),
    "absolute": (special("/train/cat/x.png", tarfile.REGTYPE), "relative paths inside it, got '/train/cat/x.png'"),
    "symlink": (special("train/cat/l.png", tarfile.SYMTYPE, "/etc/passwd"), "got a link: 'train/cat/l.png'"),
    "hard link": (special("train/cat/l.png", tarfile.LNKTYPE, "train/cat/0.png"), "got a link: 'train/cat/l.png'"),
    "device": (special("train/cat/d.png", tarfile.CHRTYPE), "got a device or another special file: 'train/cat/d.png'"),
    "empty image": (special("train/cat/e.png", tarfile.REGTYPE), "train/cat/e.png in a.tar must be a whole image"),
    "stray": (special("x.png", tarfile.REGTYPE), "x.png in a.tar must be a whole image file"),
    "empty class": (special("train/emu", tarfile.DIRTYPE), "got none in train/emu"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_read_archive_refuses_a_member(tmp_path, cache, name):
    info, message = BAD_MEMBERS[name]
    path = write_archive(tmp_path / "a.tar", members(), info, mode="w")
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        data.load_dataset(path, SIZE)
    assert not cache.exists()


def test_read_archive_refuses_a_huge_member(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBER_BYTES", 10)
    with pytest.raises(ValueError, match=r"must be at most 10 bytes, got \d+: 'train/cat/0.png'"):
        data.load_dataset(write_archive(tmp_path / "a.tar", members(), mode="w"), SIZE)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.xz", "a.tar.gz", "a.tar.bz2"])
def test_read_archive_refuses_a_truncated_archive(tmp_path, cache, name):
    whole = write_archive(tmp_path / name, members(), mode="w:" + name.partition("tar.")[2]).read_bytes()
    for length in (len(whole) // 3, len(whole) * 2 // 3, len(whole) - 10):
        (tmp_path / name).write_bytes(whole[:length] if name != "a.tar" else whole[: 1024 + length // 4])
        with pytest.raises(ValueError, match=rf"read_archive: {name} must .* after .*; fetch it again"):
            data.load_dataset(tmp_path / name, SIZE)
    assert not cache.exists()


def test_read_archive_refuses_a_cut_between_members(tmp_path):
    path = write_archive(tmp_path / "a.tar", members(), mode="w")
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"must end with a tar end mark, got none after test/dog/1\.png: it is truncated"
    ):
        data.load_dataset(path, SIZE)


@pytest.mark.parametrize("damage", [bytes(512), b"?" * 512])
@pytest.mark.parametrize("member", [1, 6, 11])
def test_read_archive_refuses_a_damaged_header(tmp_path, cache, member, damage):
    path = write_archive(tmp_path / "a.tar", members(), mode="w")
    with tarfile.open(path) as tar:
        before, damaged = tar.getmembers()[member - 1 : member + 1]
    content = path.read_bytes()
    path.write_bytes(content[: damaged.offset] + damage + content[damaged.offset + 512 :])
    with pytest.raises(ValueError, match=f"a.tar must end after its last member, got more after {before.name}: a head"):
        data.load_dataset(path, SIZE)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_read_archive_refuses_two_archives_in_one(tmp_path, name):
    path = write_archive(tmp_path / name, members(), mode="w:" + name.partition("tar.")[2])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"must end after its last member, got more after test/dog/2\.png"):
        data.load_dataset(path, SIZE)


def test_read_archive_refuses_a_member_given_twice(tmp_path):
    path = write_archive(tmp_path / "a.tar", members(), mode="w")
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("./train/cat/1.png")
        info.size = len(png(50))
        tar.addfile(info, io.BytesIO(png(50)))
    with pytest.raises(ValueError, match=r"a\.tar: each image must be given once, got train/cat/1\.png twice"):
        data.load_dataset(path, SIZE)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.xz"])
def test_read_archive_refuses_a_huge_header(tmp_path, name, tar_format):
    files = members() | {"x" * (2**20 + 2**15): b""}
    with tarfile.open(tmp_path / name, "w:" + name.partition("tar.")[2], format=tar_format) as tar:
        for member, content in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=f"headers of {name} must take at most 1048576 bytes a member, got more"):
        data.load_dataset(tmp_path / name, SIZE)


def test_read_archive_keeps_a_long_name(tmp_path):
    path = write_archive(tmp_path / "a.tar", {"x" * 2000 + f"/{name}": png for name, png in members().items()})
    assert data.load_dataset(path, SIZE).classes == ("cat", "dog")


@pytest.mark.parametrize("place", ["member", "end"])
def test_read_archive_refuses_what_expands_too_far(tmp_path, monkeypatch, place):
    monkeypatch.setattr(archive, "MIN_EXPANDED_BYTES", 2**17)
    path = write_archive(tmp_path / "a.tar.xz", members() | {"notes.txt": bytes(2**21 * (place == "member"))})
    if place == "end":
        path.write_bytes(lzma.compress(lzma.decompress(path.read_bytes()) + bytes(2**21)))
    with pytest.raises(ValueError, match=r"a\.tar\.xz must expand to at most \d{6} bytes, got more"):
        data.load_dataset(path, SIZE)


def test_read_archive_refuses_a_size_beyond_the_end(tmp_path):
    path = write_archive(tmp_path / "a.tar", members(), mode="w")
    info = special("notes.txt", tarfile.REGTYPE)
    info.size = 2**70
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    with pytest.raises(ValueError, match=r"a\.tar must expand to at most"):
        list(archive.read_archive(path, lambda _: False))


@pytest.mark.parametrize("stray", ["emu/9.png", "other/train/cat/9.png"])
def test_read_archive_refuses_two_layouts(tmp_path, stray):
    path = write_archive(tmp_path / "a.tar", members() | {stray: png(0)}, mode="w")
    with pytest.raises(ValueError, match=f"images must lie in .*, got {stray}"):
        data.load_dataset(path, SIZE)


def test_read_archive_refuses_what_is_no_archive(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no archive" * 200)
    with pytest.raises(ValueError, match=r"read_archive: a.tar must be a whole tar archive, got ReadError"):
        data.load_dataset(tmp_path / "a.tar", SIZE)
