"""Loading images: every source on tiny generated files, and every way in which one can be damaged."""

import hashlib
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.common import archive, data
from experiments.common.torchvision_import import import_torchvision

SIZE = 8


def pixels(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(seed, size=SIZE):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, size)).save(buffer, format="png")
    return buffer.getvalue()


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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(archive.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_load_dataset_reads_class_folders(tmp_path):
    found = data.load_dataset(
        write_folder(tmp_path / "set", members() | {"train/cat/.1.png": b"", "README": b"x"}), SIZE
    )
    assert found.classes == ("cat", "dog")
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.train_images.shape == (6, 3, SIZE, SIZE)
    np.testing.assert_array_equal(found.train_images[4].permute(1, 2, 0).numpy(), pixels(4))
    np.testing.assert_array_equal(found.test_images[0].permute(1, 2, 0).numpy(), pixels(6))


def test_load_dataset_splits_a_folder_without_split(tmp_path):
    files = members(splits=("",), each=10)
    found = data.load_dataset(write_folder(tmp_path / "set", files), SIZE)
    assert (len(found.train_labels), found.test_labels.tolist()) == (16, [0, 0, 1, 1])
    assert "no split, a fixed 20%" in found.note
    everything = torch.cat([found.train_images, found.test_images]).flatten(1).tolist()
    assert len({tuple(image) for image in everything}) == 20
    assert_same(found, data.load_dataset(tmp_path / "set", SIZE))


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.xz", "w:xz"), ("a.tar.gz", "w:gz"), ("a.tar.bz2", "w:bz2")]
)
@pytest.mark.parametrize("prefix", ["", "./", "top/"])
def test_load_dataset_archive_equals_folder(tmp_path, name, mode, prefix):
    folder = data.load_dataset(write_folder(tmp_path / "set", members()), SIZE)
    files = {prefix + path: content for path, content in reversed(members().items())} | {
        prefix + "notes.txt": b"x",
        prefix + "train/cat/._0.png": b"x",
    }
    path = write_archive(tmp_path / name, files, mode=mode)
    assert_same(folder, data.load_dataset(path, SIZE))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["set", "cache", name])


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


@pytest.mark.parametrize("stray", ["emu/9.png", "other/train/cat/9.png"])
def test_read_archive_refuses_two_layouts(tmp_path, stray):
    path = write_archive(tmp_path / "a.tar", members() | {stray: png(0)}, mode="w")
    with pytest.raises(ValueError, match=f"images must lie in .*, got {stray}"):
        data.load_dataset(path, SIZE)


def test_read_archive_refuses_what_is_no_archive(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no archive" * 200)
    with pytest.raises(ValueError, match=r"read_archive: a.tar must be a whole tar archive, got ReadError"):
        data.load_dataset(tmp_path / "a.tar", SIZE)


def layout_error(files, message):
    return pytest.param(files, message, id=message[:30])


@pytest.mark.parametrize("in_archive", [False, True])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        layout_error({"train/cat/9.png": png(0)[:60]}, r"train/cat/9\.png.* must be a whole image file, got"),
        layout_error({"train/cat/9.png": b"no image"}, r"train/cat/9\.png.* got UnidentifiedImageError"),
        layout_error({"test/dog/9.png": png(0, 9)}, r"test/dog/9\.png.* must be 8 x 8 pixels, got 9 x 9"),
        layout_error({"train/emu/9.png": png(0)}, "each class folder must hold images, got none in test/emu"),
        layout_error({"train/cat/deep/9.png": png(0)}, r"images must lie in .*, got train/cat/deep/9\.png"),
    ],
)
def test_load_dataset_refuses_files(tmp_path, files, message, in_archive):
    files = members() | files
    path = write_archive(tmp_path / "a.tar", files, mode="w") if in_archive else write_folder(tmp_path / "a", files)
    with pytest.raises(ValueError, match=message):
        data.load_dataset(path, SIZE)


def test_load_dataset_refuses_an_empty_class_folder(tmp_path):
    write_folder(tmp_path / "a", members())
    (tmp_path / "a" / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match="got none in train/emu"):
        data.load_dataset(tmp_path / "a", SIZE)


def test_load_dataset_refuses_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be an existing folder or archive, got '.*nothing'"):
        data.load_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="a must have both train and test, got no test"):
        data.load_dataset(write_folder(tmp_path / "a", members(splits=("train",))), SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: there must be images in class folders, got none"):
        data.load_dataset(tmp_path / "empty", SIZE)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a folder or end with \.tar, .*, got 'a\.zip'"):
        data.load_dataset(tmp_path / "a.zip")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    datasets = import_torchvision().datasets
    folder = tmp_path / "sets" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = {}
    content = {
        name: {"data": np.arange(index, 6144 + index).reshape(2, 3072) % 251, "labels": [index, 9]}
        for index, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"])
    }
    for batch in content.values():
        batch["data"] = batch["data"].astype(np.uint8)
    content["batches.meta"] = {"label_names": [f"class {index}" for index in range(10)]}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()  # noqa: S324
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in list(content)[:2]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return folder


def test_load_dataset_reads_cifar10(cifar):
    for path in (cifar, cifar.parent):
        found = data.load_dataset(path)
        assert found.train_labels.tolist() == [0, 9, 1, 9]
        assert found.test_images.shape == (2, 3, 32, 32)
        expected = torch.arange(6144).reshape(2, 3, 32, 32) % 251
        assert torch.equal(found.train_images[:2].long(), expected)
        assert (found.name, found.classes[9]) == ("CIFAR-10", "class 9")


def test_load_dataset_refuses_cifar10(cifar):
    with pytest.raises(ValueError, match="image_size must be 32 for cifar-10-batches-py, got 8"):
        data.load_dataset(cifar, SIZE)
    (cifar / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cifar-10-batches-py must be whole, got: Dataset not found or corrupted"):
        data.load_dataset(cifar)


def test_find_dataset_prefers_what_is_there(tmp_path, cifar, monkeypatch):
    assert data.find_dataset().name == "digits"
    monkeypatch.setenv(data.DATA_VARIABLE, str(cifar.parent))
    assert "cifar-10-batches-py" in data.find_dataset().note
    (tmp_path / "other").mkdir()
    write_archive(tmp_path / "other" / "cifar10.tar.xz", members())
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "other"))
    assert "from cifar10.tar.xz, 6 training and 6 test images" in data.find_dataset(SIZE).note
    write_folder(tmp_path / "other" / "cifar10", members(each=1))
    assert "2 training and 2 test" in data.find_dataset(SIZE).note
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "other" / "cifar10.tar.xz"))
    assert "6 training" in data.find_dataset(SIZE).note
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(
        FileNotFoundError, match=r"BSFAST_DATA must name an existing folder or archive, got '.*missing'"
    ):
        data.find_dataset()


def test_load_digits_enlarges_and_splits():
    digits = data.load_digits()
    assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
    assert digits.train_images.shape[1:] == (3, 32, 32)
    blocks = digits.train_images.unfold(2, 4, 4).unfold(3, 4, 4)
    assert (blocks.amax((1, 4, 5)) == blocks.amin((1, 4, 5))).all()
    assert digits.train_images.max() == 255
    assert "because no CIFAR-10 was found; set BSFAST_DATA" in digits.note
