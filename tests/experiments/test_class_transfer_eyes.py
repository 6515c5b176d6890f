"""Eyes of synthetic cats and of photographs, segmented from a generator's parts."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments.class_transfer.data import load_photographs
from experiments.class_transfer.eyes import judge_eyes
from experiments.class_transfer.model import make_players
from experiments.class_transfer.setup import choose
from experiments.common.drawing import decode
from experiments.common.record import Run


def test_judge_eyes_shows_a_photograph(tmp_path):
    pytest.importorskip("skimage.data", reason="scikit-image is no requirement")
    setup = choose("cpu", {"widths": (1, 2), "discriminator_widths": (1, 2), "branches": 2})
    decomposer = make_players(setup, 2).average
    record = Run("class-transfer", {}, tmp_path)
    judge_eyes(record, decomposer, classes=("dog", "cat"), image_size=32, count=5, seed=0, made="Untrained.")
    assert [entry["name"] for entry in record.figures] == ["figure-12", "figure-21", "figure-12-photographs"]
    assert [
        len(decode(json.loads((record.folder / f"{name}.json").read_text())["data"])["images"])
        for name in ("figure-12", "figure-21", "figure-12-photographs")
    ] == [4, 1, 1]
    assert record.metrics["eyes"]["median_dice"] == pytest.approx(np.median(record.metrics["eyes"]["dice"]))
    assert set(record.metrics["eyes"]["sets"]) == {"locating", "constant", "mu", "lambda1", "steps"}
    assert 0 <= record.metrics["eyes"]["true_layers"]["median_dice"] <= 1


def test_photographs_are_the_cats_of_an_archive(tmp_path):
    for name, colour in (("cat", 200), ("dog", 50)):
        folder = tmp_path / "animals" / name
        folder.mkdir(parents=True)
        for k in range(12):
            Image.new("RGB", (40, 32), (colour, k, 0)).save(folder / f"{k}.png")
    setup = choose("cpu", {"photographs": str(tmp_path / "animals")})
    found = load_photographs(setup)
    assert found.images.shape == (8, 3, 32, 32)
    assert (found.images[:, 0] == 200).all()
    assert "animals" in found.note
    assert load_photographs(choose("cpu", {})) is None
    shutil.rmtree(tmp_path / "animals" / "cat")
    with pytest.raises(ValueError, match="classes must be different ones of dog"):
        load_photographs(setup)
    with pytest.raises(ValueError, match="photographs must be left out unless the data is SynthAnimals"):
        choose("cpu", {"data": "SynthFaces", "photographs": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="must be an existing folder or archive"):
        load_photographs(choose("cpu", {"photographs": str(tmp_path / "none")}))
