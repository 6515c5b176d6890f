"""Tiny runs of the classifier: what they record, that they repeat, and that a population trains as its models would."""

import dataclasses

import pytest
import torch

from experiments.classifier.population import Model, Population
from experiments.classifier.run import run
from experiments.classifier.setup import BUDGETS, Setup, choose
from experiments.classifier.training import Options, train
from experiments.common.data import load_digits
from experiments.common.record import Run
from experiments.common.resumable import CHECKPOINT

SETUP = Setup(
    branches=3, all_m=(2,), seeds=2, widths=(1, 1, 2, 2), train_images=64, epochs=2, batch_size=32, speed_repeats=1
)


@pytest.fixture(scope="module")
def digits():
    digits = load_digits()
    return dataclasses.replace(digits, test_images=digits.test_images[:60], test_labels=digits.test_labels[:60])


def test_run_records_figures_claims_and_speed(tmp_path, digits):
    record = Run("classifier", SETUP.to_json(), root=tmp_path)
    run(record, digits, SETUP)
    names = [entry["name"] for entry in record.figures]
    assert names == [
        *("figure-5-left", "figure-5-middle", "figure-6", "figure-6-summary"),
        *("figure-7", "figure-7-centred", "figure-7-margin", "figure-8", "figure-16"),
        *("figure-17-m2", "figure-17-m3", "figure-17-covariances", "training"),
    ]
    said = "Scaled down: budget cpu, widths 1, 1, 2, 2, 64 training images, 4 steps, hard clamp, weight decay 0.0005, "
    said += "readout scale 1.0, fp32, seed 0. Data: scikit"
    assert all(said in entry["note"] for entry in record.figures)
    assert {claim["observation"] for claim in record.claims} == {1, 2, 3, 4, 5, 6, 7, 8, None}
    assert record.metrics["steps"] == 4
    assert {"m2-seed0", "m2-seed1", "m3-seed0", "m3-seed1"} <= record.metrics.keys()
    assert 0 <= record.metrics["m2-seed1"]["test_accuracy"] <= 1
    assert record.metrics["training"]["momentum"] == 0.9
    assert [len(entry["test_accuracy"]) for entry in record.metrics["history"]] == [4, 4]
    assert [row["baseline"] for row in record.metrics["speed"]["rows"]] == [False, True, True]
    drawn = {entry["name"]: (record.folder / entry["file"]).read_bytes() for entry in record.figures}
    record.redraw()
    assert drawn == {entry["name"]: (record.folder / entry["file"]).read_bytes() for entry in record.figures}


def test_run_is_the_same_for_one_seed(tmp_path, digits):
    setup = dataclasses.replace(SETUP, all_m=(), seeds=1, branches=2, speed_repeats=0, readout_scale=None)
    results = []
    for seed in (0, 0, 1):
        own = dataclasses.replace(setup, seed=seed)
        record = Run("classifier", own.to_json(), root=tmp_path)
        run(record, digits, own)
        results.append((record.claims, record.metrics[f"m2-seed{seed}"]["norms"]))
    assert results[0] == results[1] != results[2]


def test_run_goes_on_from_its_checkpoint(tmp_path, digits):
    setup = dataclasses.replace(SETUP, all_m=(), seeds=1, branches=2, speed_repeats=0)
    first = Run("classifier", setup.to_json(), root=tmp_path)
    run(first, digits, setup)
    first.close()
    again = Run.resume(first.folder)
    run(again, digits, Setup.from_json(again.config))
    assert again.claims == first.claims
    assert again.metrics == first.metrics
    with pytest.raises(
        ValueError, match="belongs to another training: its data is 'digits, CRC of the training images"
    ):
        run(again, digits, dataclasses.replace(setup, train_images=63))
    (again.folder / CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="must be a whole checkpoint, but it is damaged"):
        run(again, digits, setup)


def test_population_trains_each_model_as_if_alone(digits):
    setup = dataclasses.replace(SETUP, seeds=1)
    options = Options(epochs=1, batch_size=32)
    images, labels = digits.train_images[:64], digits.train_labels[:64]
    together = Population(setup, 10)
    train(together.net, together.score, images, labels, options=options)
    assert together.models == [Model(2, 0), Model(3, 0)]
    start = 0
    for model in together.models:
        alone = Population(dataclasses.replace(setup, branches=model.branches, all_m=()), 10)
        train(alone.net, alone.score, images, labels, options=options)
        own = dict(alone.net.state_dict())
        for name, value in together.net.state_dict().items():
            torch.testing.assert_close(value[start : start + model.branches], own[name], rtol=1e-3, atol=1e-4)
        start += model.branches


def test_choose_completes_a_budget():
    setup = choose("cpu", {"epochs": 1, "all_m": (2,)}, train_images=1437, test_images=360)
    assert (setup.epochs, setup.sizes, setup.train_images, setup.clamp) == (1, [2, 16], 1437, "one_sided")
    assert choose("auto", {}, train_images=10**5, test_images=10**5).budget in {"cpu", "gpu"}
    paper = choose("paper", {"device": "cpu"}, train_images=10**5, test_images=10**5)
    assert (paper.epochs, paper.sizes, paper.clamp, paper.precision) == (200, [2, 4, 8, 16, 32], "hard", "fp32")
    assert Setup.from_json(paper.to_json()) == paper
    for budget, choices in BUDGETS.items():
        assert dataclasses.replace(Setup(), **choices | {"budget": budget, "precision": "fp32"})


def test_choose_takes_the_16_bit_type_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, precision in (((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda own=capability: own)
        assert choose("auto", {}, train_images=100, test_images=100).precision == precision


def test_choose_refuses(digits):
    with pytest.raises(ValueError, match="train_images must be at most 1437, all there are, got 9999"):
        choose("cpu", {"train_images": 9999}, train_images=1437, test_images=360)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="budget 'paper' with device 'cuda' needs a CUDA device"):
            choose("paper", {}, train_images=100, test_images=100)
    with pytest.raises(ValueError, match="choices must have budget, branches"):
        Setup.from_json({"seed": 0})
