"""Loading images: every source on tiny generated files, and every way in which one can be damaged."""

import hashlib
import io
import pickle
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.common import archive, data, images
from experiments.common.torchvision_import import import_torchvision
from tests.experiments.image_files import (
    SIZE,
    assert_same,
    encoded,
    members,
    pixels,
    png,
    special,
    write_archive,
    write_folder,
)


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


@pytest.mark.parametrize("in_archive", [False, True])
def test_load_dataset_passes_over_hidden_folders(tmp_path, in_archive):
    hidden = {"train/.ipynb_checkpoints/9.png": png(0), ".trash/cat/9.png": png(0), "test/dog/.old/9.png": png(0)}
    folder = write_folder(tmp_path / "set", members() | hidden)
    (folder / "train" / ".empty").mkdir()
    path = folder
    if in_archive:
        path = write_archive(tmp_path / "a.tar", members() | hidden, special("train/.empty", tarfile.DIRTYPE), mode="w")
    found = data.load_dataset(path, SIZE)
    assert (found.classes, len(found.train_labels), len(found.test_labels)) == (("cat", "dog"), 6, 6)


@pytest.mark.parametrize("in_archive", [False, True])
def test_load_dataset_tests_on_val_where_there_is_no_test(tmp_path, in_archive):
    def load(files, name):
        if in_archive:
            return data.load_dataset(write_archive(tmp_path / f"{name}.tar", files, mode="w"), SIZE)
        return data.load_dataset(write_folder(tmp_path / name, files), SIZE)

    expected = load(members(), "test")
    renamed = {name.replace("test/", "val/"): content for name, content in members().items()}
    assert_same(expected, load(renamed, "val"))
    assert_same(expected, load(members() | {"val/cat/9.png": png(99)}, "both"))


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


def test_load_dataset_reads_an_archive_of_the_current_folder(tmp_path):
    files = {f"./{name}": content for name, content in members(splits=("",)).items()}
    path = write_archive(tmp_path / "a.tar", files, special(".", tarfile.DIRTYPE), mode="w")
    assert data.load_dataset(path, SIZE).classes == ("cat", "dog")


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
    for splits in (("train",), ("test", "val")):
        folder = write_folder(tmp_path / splits[0], members(splits=splits))
        with pytest.raises(
            ValueError, match=f"{splits[0]}: there must be train and test, or train and val, got {', '.join(splits)}$"
        ):
            data.load_dataset(folder, SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: there must be images in class folders, got none"):
        data.load_dataset(tmp_path / "empty", SIZE)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a folder or end with \.tar, .*, got 'a\.zip'"):
        data.load_dataset(tmp_path / "a.zip")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_decode_reads_the_modes_of_eight_bits(mode):
    image = Image.fromarray(pixels(0)).convert(mode)
    content = encoded(image, "jpeg" if mode == "CMYK" else "png")
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(images.decode(content, "a", SIZE), expected)


def test_decode_drops_transparency_of_a_palette():
    content = encoded(Image.fromarray(pixels(0)).quantize(8), transparency=bytes([9, 99, 200]))
    opaque = encoded(Image.fromarray(pixels(0)).quantize(8))
    np.testing.assert_array_equal(images.decode(content, "a", SIZE), images.decode(opaque, "a", SIZE))


def test_decode_refuses_sixteen_bits_of_gray():
    content = encoded(Image.fromarray(np.full((SIZE, SIZE), 1000, dtype=np.uint16)))
    with pytest.raises(ValueError, match=r"a must have one of the modes 1, L, P, RGB, .*, got I;16$"):
        images.decode(content, "a", SIZE)


@pytest.mark.parametrize("image_format", ["eps", "gif", "tiff"])
def test_decode_refuses_other_formats(image_format):
    with pytest.raises(ValueError, match="a must be a whole image file, got UnidentifiedImageError"):
        images.decode(encoded(Image.fromarray(pixels(0)), image_format), "a", SIZE)


@pytest.mark.parametrize("action", ["ignore", "default", "error"])
def test_decode_refuses_a_bomb_under_every_warning_filter(monkeypatch, action):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        with pytest.raises(ValueError, match="a must be a whole image file, got DecompressionBombWarning"):
            images.decode(png(0), "a", SIZE)
    assert not caught


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


def test_load_dataset_reads_cifar10(cifar, monkeypatch):
    for path in (cifar, cifar.parent, "."):
        monkeypatch.chdir(cifar)
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


def cifar_archive(path, cifar):
    files = {f"cifar-10-batches-py/{file.name}": file.read_bytes() for file in sorted(cifar.iterdir())}
    return write_archive(path, {"cifar-10-batches-py/readme.html": b"<p>"} | files, mode="w:gz")


def test_load_dataset_reads_the_official_archive(tmp_path, cifar, monkeypatch):
    path = cifar_archive(tmp_path / "cifar-10-python.tar.gz", cifar)
    found = data.load_dataset(path)
    assert_same(found, data.load_dataset(cifar))
    assert found.note == "CIFAR-10 from cifar-10-python.tar.gz, 4 training and 2 test images"
    (tmp_path / "found").mkdir()
    path.rename(tmp_path / "found" / path.name)
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "found"))
    assert_same(found, data.find_dataset())


class Touch:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_load_dataset_unpickles_only_the_official_batches(tmp_path, cifar):
    (cifar / "data_batch_2").write_bytes(pickle.dumps(Touch(str(tmp_path / "touched"))))
    path = cifar_archive(tmp_path / "cifar-10-python.tar.gz", cifar)
    with pytest.raises(
        ValueError, match=r"cifar-10-python\.tar\.gz must be whole, got: Dataset not found or corrupted"
    ):
        data.load_dataset(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz must be a whole tar archive"):
        data.load_dataset(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("cifar10.tar", "CIFAR-10"),
        ("CIFAR-10-jpeg.tar", "CIFAR-10"),
        ("cifar100.tar", "cifar100"),
        ("cifar-100-jpeg.tar", "cifar-100-jpeg"),
        ("cats.tar", "cats"),
    ],
)
def test_load_dataset_names_cifar10_only(tmp_path, source, name):
    assert data.load_dataset(write_archive(tmp_path / source, members(), mode="w"), SIZE).name == name


def test_find_dataset_takes_no_cifar100(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "sets", {f"cifar-100/{name}": content for name, content in members().items()})
    write_archive(folder / "cifar-100.tar", members(), mode="w")
    write_archive(folder / "CIFAR10.tar", members(), mode="w")
    monkeypatch.setenv(data.DATA_VARIABLE, str(folder))
    assert "from CIFAR10.tar" in data.find_dataset(SIZE).note


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val"), ("",)])
def test_find_dataset_takes_class_folders_that_are_named(tmp_path, monkeypatch, splits):
    folder = write_folder(tmp_path / "pets", members(splits=splits))
    monkeypatch.setenv(data.DATA_VARIABLE, str(folder))
    found = data.find_dataset(SIZE)
    assert (found.name, found.classes) == ("pets", ("cat", "dog"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv(data.DATA_VARIABLE, ".")
    assert data.find_dataset(SIZE).name == "pets"


def test_find_dataset_takes_class_folders_of_cifar10(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", {"plots/1.png": png(0)})
    assert data.find_dataset(SIZE).name == "digits"
    write_folder(tmp_path / "data" / "cifar10", members(splits=("",)))
    assert data.find_dataset(SIZE).name == "CIFAR-10"


def test_find_dataset_refuses_a_folder_without_images(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "none", {"notes/a.txt": b"", "cats.tar": b"", ".hidden/1.png": png(0)})
    monkeypatch.setenv(data.DATA_VARIABLE, str(folder))
    with pytest.raises(
        FileNotFoundError,
        match=r"BSFAST_DATA must name or hold cifar-10-batches-py, .*train/<class>.*, got none of these in '.*none'",
    ):
        data.find_dataset(SIZE)


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
