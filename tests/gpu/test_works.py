"""What is measured on a GPU: what counts, what is refused, and in which order."""

import argparse
import json
import subprocess
from pathlib import Path

import pytest
import torch

from experiments.classifier import command
from experiments.classifier.setup import choose
from tests.gpu import convolutions, machine, networks, suite, works


def test_gpu_networks_run_vmap_last(monkeypatch):
    def contestant(name: str, case):
        return own("loop", case)

    own, timer, peaks = networks.Contestant, machine.Timer("cpu", 0, rounds=1), {"float32": 1.0, "copy_gb_s": 1.0}
    monkeypatch.setattr(networks, "Contestant", contestant)
    entry = networks.measure(works.TINY, "forward", torch.float32, timer, peaks, compiled=True)
    eager = [name for name in entry["results"] if not name.endswith(", CUDA graph")]
    assert eager[-2:] == [networks.COMPILED, networks.VMAP]


def test_gpu_convolutions_are_timed_before_any_capture(monkeypatch):
    class Noting(machine.Timer):
        def run(self, named):
            order.append(f"times {len(named)}")
            return super().run(named)

    def capture(work, device):
        order.append("captures")
        raise RuntimeError("no capture")

    order = []
    monkeypatch.setattr(convolutions, "graphed", capture)
    peaks = {"float32": 1.0, "copy_gb_s": 1.0}
    timer = Noting("cpu", 0, rounds=1)
    entry = convolutions.measure(convolutions.cases(2, 4)[0], "conv2d", torch.float32, timer, peaks)
    assert order == ["times 5", *["captures"] * 5, "times 0"]
    assert sum("error" in values for values in entry["results"].values()) == 5


def test_gpu_networks_keep_the_other_ways_when_one_refuses(monkeypatch):
    def contestant(name: str, case):
        if name == "grouped":
            raise NotImplementedError("not these")
        return own(name, case)

    own, timer, peaks = networks.Contestant, machine.Timer("cpu", 0, rounds=1), {"float32": 1.0, "copy_gb_s": 1.0}
    monkeypatch.setattr(networks, "Contestant", contestant)
    monkeypatch.setattr(networks, "WAYS", ("bsfast", "grouped", "loop"))
    entry = networks.measure(works.TINY, "forward", torch.float32, timer, peaks, compiled=False)
    assert entry["results"]["grouped"] == {"error": "NotImplementedError: not these"}
    assert entry["results"].keys() == {
        f"{way}{kind}" for way in ("bsfast", "loop") for kind in ("", ", CUDA graph")
    } | {"grouped"}


def test_gpu_peaks_measure_every_dtype():
    class Counting:
        device = "cpu"

        def run(self, named):
            return {name: {"median_ms": 1e-6 * (k + 1)} for k, name in enumerate(named)}

    peaks = machine.peaks(Counting(), 80)
    assert peaks["float32"] > peaks["bfloat16"] > peaks["float16"] > 0


def test_gpu_full_bench_names_what_decides(monkeypatch, tmp_path):
    def names(*, full: bool):
        given = {"full": full, "tiny": False, "record": None, "budget": None}
        return {name for name, _ in works.works("cpu", **given)}

    few = {f"{case.name} step float16" for case in (works.CENTRE, works.NARROW_FIRST)}
    assert few <= names(full=False)
    monkeypatch.setenv("BSFAST_DATA", str(tmp_path))
    assert works.CLASSIFIER not in names(full=True)
    (tmp_path / "cifar-10-batches-py").mkdir()
    full = {*few, works.CLASSIFIER, *(f"products of 1024 rows, {count} times, float32" for count in (1, 16))}
    assert full <= names(full=True)
    assert works.CLASSIFIER not in names(full=False)


def trains(monkeypatch, done, epochs: int, ended_by: str):
    """Let the classifier end with one process after the other, and a record of what it trained."""

    def run(command, budget):
        folder = Path(command[command.index("--out") + 1], "classifier-1")
        folder.mkdir()
        metrics = {"history": [{}] * epochs, "ended_by": ended_by}
        (folder / "run.json").write_text(json.dumps({"metrics": metrics}))
        return done.pop(0) if done else None

    monkeypatch.setattr(works, "run", run)


@pytest.mark.parametrize(("epochs", "ended_by"), [(30, "time limit"), (29, "epochs")])
def test_gpu_classifier_needs_all_epochs(monkeypatch, epochs, ended_by):
    trains(monkeypatch, [subprocess.CompletedProcess([], 0, "Data: CIFAR-10.", "")], epochs, ended_by)
    with pytest.raises(RuntimeError, match=f"must train 30 epochs, got {epochs}, ended by {ended_by}"):
        works.train_classifier(suite.Budget(1))


def test_gpu_classifier_trains_one_model_without_a_limit():
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    command.add_arguments(parser)
    given = vars(parser.parse_args(works.OPTIONS))
    setup = choose(given.pop("budget"), given | {"device": "cpu"}, train_images=50_000, test_images=10_000)
    assert (setup.sizes, setup.epochs, setup.time_limit) == ([16], 30, 1e6)


def test_gpu_classifier_needs_its_data(monkeypatch):
    said = [
        (0, "Data: CIFAR-10 from here.", ""),
        (0, "Data: digits.", ""),
        (1, "Data: CIFAR-10 from here.", "a\nno GPU"),
    ]
    trains(monkeypatch, [subprocess.CompletedProcess([], *of_one) for of_one in said], 30, "epochs")
    entry = works.train_classifier(suite.Budget(1))
    assert entry.keys() == {"seconds", "epochs", "ended_by", "clocks"}
    assert (entry["epochs"], entry["ended_by"]) == (30, "epochs")
    with pytest.raises(RuntimeError, match="must train on CIFAR-10, got status 0: Data: digits"):
        works.train_classifier(suite.Budget(1))
    with pytest.raises(RuntimeError, match="got status 1: no GPU"):
        works.train_classifier(suite.Budget(1))
    assert works.train_classifier(suite.Budget(1)) is None
