"""What a person may hand the class transfer that it cannot take: each ends with a message, and nothing is lost."""

import json

import pytest
import torch
from PIL import Image

from experiments import cli
from experiments.class_transfer.model import load_trained
from experiments.class_transfer.setup import choose
from experiments.common.resumable import CHECKPOINT
from tests.experiments.image_files import encoded, members, png, write_folder

TINY = ["class-transfer", "--budget", "cpu", "--discriminator-widths", "1,2", "--branches", "2", "--steps", "1"]
TINY += ["--batch-size", "2", "--classifier-steps", "1", "--score-images", "0"]
SYNTHETIC = ["--train-images", "6", "--test-images", "3"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BSFAST_DATA", raising=False)
    monkeypatch.setenv("BSFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def images_of(size=32):
    return {name: png(seed, size) for seed, name in enumerate(members())}


def runs(folder):
    return sorted((folder / "runs").glob("class-transfer-*"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"train/cat/9.png": png(9, 32)[:200]}, r"train/cat/9.png must be a whole image file"),
        ({"test/dog/9.png": png(9, 31)}, "test/dog/9.png must be at least 32 x 32 pixels, got 31 x 31"),
        ({"train/emu/9.png": png(9, 32)}, "each class folder must hold images, got none in test/emu"),
    ],
    ids=["truncated", "smaller", "empty class"],
)
def test_class_transfer_refuses_images(own_folder, capsys, bad, message):
    write_folder(own_folder / "zoo", images_of() | bad)
    assert cli.main([*TINY, "--widths", "1,2", "--data", "zoo"]) == 1
    assert message in capsys.readouterr().err


def test_class_transfer_takes_grey_alpha_and_larger_images(own_folder):
    grey, alpha = (encoded(Image.new(mode, (40, 33), 128)) for mode in ("L", "RGBA"))
    write_folder(own_folder / "zoo", images_of() | {"train/cat/8.png": grey, "train/dog/9.png": alpha})
    assert cli.main([*TINY, "--widths", "1,2", "--data", "zoo"]) == 0
    assert (runs(own_folder)[0] / "sliders.html").exists()


def test_class_transfer_refuses_the_checkpoint_of_another_architecture(own_folder, capsys):
    for widths in ("1,2", "1,3"):
        assert cli.main([*TINY, *SYNTHETIC, "--widths", widths, "--out", widths]) == 0
    one, other = (next((own_folder / widths).iterdir()) for widths in ("1,2", "1,3"))
    foreign = (other / CHECKPOINT).read_bytes()
    (one / CHECKPOINT).write_bytes(foreign)
    for words in (["class-transfer", "--resume", str(one)], ["sliders", str(one)]):
        assert cli.main(words) == 1
        assert "belongs to another training: its widths is [1, 3], here it is [1, 2]" in capsys.readouterr().err
    assert (one / CHECKPOINT).read_bytes() == foreign
    with pytest.raises(ValueError, match="belongs to another training"):
        load_trained(one)


def test_class_transfer_that_diverges_keeps_its_last_good_checkpoint(own_folder, capsys):
    words = ["--widths", "1,2", "--steps", "60", "--lr", "1e18", "--save-seconds", "0", "--report-steps", "1"]
    assert cli.main([*TINY, *SYNTHETIC, *words]) == 1
    assert "must stay finite" in capsys.readouterr().err
    (folder,) = runs(own_folder)
    assert not json.loads((folder / "run.json").read_text())["finished"]
    if (folder / CHECKPOINT).exists():
        stored = torch.load(folder / CHECKPOINT, weights_only=True)["state"]["nets"]["decomposer"]
        assert all(value.isfinite().all() for value in stored.values())


def test_choose_takes_the_budget_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto", {}).budget == "cpu"
    with pytest.raises(RuntimeError, match="budget 'gpu' with device 'cuda' needs a CUDA device"):
        choose("gpu", {})
    assert choose("gpu", {"device": "cpu"}).precision == "fp32"


def test_sliders_refuses_other_data(own_folder, capsys):
    assert cli.main([*TINY, *SYNTHETIC, "--widths", "1,2"]) == 0
    (folder,) = runs(own_folder)
    write_folder(own_folder / "zoo", images_of())
    record = json.loads((folder / "run.json").read_text())
    record["config"] |= {"train_images": None, "test_images": None}
    (folder / "run.json").write_text(json.dumps(record))
    assert cli.main(["sliders", str(folder), "--data", "zoo"]) == 1
    assert "the data must have the run's classes cat, dog, wild, got cat, dog" in capsys.readouterr().err
