"""The record of a run: what is written reads back, whole at every moment, without PyTorch."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from experiments.common import record
from experiments.common.record import Run, to_json, write_atomically


@pytest.fixture
def run(tmp_path):
    return Run("toy", {"seed": 3, "widths": (1, 2)}, root=tmp_path / "runs")


def test_run_reads_back(run):
    run.metric("accuracy", torch.tensor(0.5))
    run.figure("curve", Figure(figsize=(1, 1)), "A curve", "of nothing")
    run.claim("Fig. 1", "it is", "it was", holds=np.bool_(True))
    run.claim("Fig. 2", "it may be", "unknown", holds=None)
    assert not Run.load(run.folder).finished
    run.finish()
    for path in (run.folder, run.folder / "run.json", str(run.folder)):
        loaded = Run.load(path)
        for name in ("folder", "experiment", "config", "seed", "metrics", "figures", "claims", "versions", "seconds"):
            assert getattr(loaded, name) == getattr(run, name)
        assert loaded.finished
    assert loaded.metrics == {"accuracy": 0.5}
    assert loaded.config == {"seed": 3, "widths": [1, 2]}
    assert [claim["holds"] for claim in loaded.claims] == [True, None]


def test_run_says_versions_and_machine(run):
    stored = json.loads((run.folder / "run.json").read_text())
    assert stored["seed"] == 3
    assert {"bsfast", "torch", "numpy", "python", "cpu", "threads"} <= stored["versions"].keys()
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["versions"]["threads"] == torch.get_num_threads()


def test_run_figure_replaces_one_of_the_same_name(run):
    run.figure("curve", Figure(figsize=(1, 1)), "first")
    run.figure("curve", Figure(figsize=(2, 1)), "second")
    assert [figure["title"] for figure in run.figures] == ["second"]
    assert (run.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_run_makes_a_new_folder_each_time(tmp_path):
    folders = [Run("toy", {}, root=tmp_path).folder for _ in range(3)]
    assert len(set(folders)) == 3
    assert sorted(tmp_path.iterdir()) == sorted(folders)


def test_run_stays_whole_when_writing_fails(run, monkeypatch):
    run.metric("before", 1)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        run.metric("after", 2)
    monkeypatch.undo()
    assert Run.load(run.folder).metrics == {"before": 1}
    assert [file.name for file in run.folder.iterdir()] == ["run.json"]


def test_run_load_needs_no_torch(run):
    code = (
        "import sys; from experiments.common.record import Run; from experiments.common.report import write_report; "
        "Run.load(sys.argv[1]); sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    root = Path(record.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(run.folder.resolve())], cwd=root, check=True)


def test_to_json_converts():
    value = {1: np.arange(2), "a": (np.float64(1.5), math.nan, math.inf), "b": torch.ones(1), "c": Path("x") / "y"}
    expected = {"1": [0, 1], "a": [1.5, "nan", "inf"], "b": [1.0], "c": "x/y"}
    assert to_json(value) == expected
    with pytest.raises(TypeError, match="value must be JSON-like, an array or a tensor, got object"):
        to_json(object())


def test_write_atomically_leaves_no_partial_file(tmp_path):
    write_atomically(tmp_path / "a", b"1")
    write_atomically(tmp_path / "a", b"2")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"2")]


def test_run_refuses(run, tmp_path):
    with pytest.raises(ValueError, match=r"experiment must be a name of letters, digits, - and _, got '\.\./toy'"):
        Run("../toy", {}, root=tmp_path)
    with pytest.raises(ValueError, match="name must have letters, digits, - and _ only, got 'a/b'"):
        run.figure("a/b", Figure(), "")
    with pytest.raises(FileNotFoundError, match=r"must be a run's folder with run\.json in it, got '.*nothing'"):
        Run.load(tmp_path / "nothing")
    for content in ("{", "[]", "{}"):
        (run.folder / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json must be the record of a run, got"):
            Run.load(run.folder)
