"""The record of a run: what is written reads back, whole at every moment, without PyTorch."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bsfast import plotting
from experiments.common import record
from experiments.common.atomic import write_atomically
from experiments.common.drawing import decode, encode, name_of
from experiments.common.record import Run, to_json, verdict

COVARIANCE = plotting.covariance_figure, {"matrices": [np.eye(2)]}


@pytest.fixture
def run(tmp_path):
    return Run("toy", {"seed": 3, "widths": (1, 2)}, root=tmp_path / "runs")


def test_run_reads_back(run):
    run.metric("accuracy", torch.tensor(0.5))
    run.figure("cov", *COVARIANCE, "A covariance", "of nothing")
    run.claim("Fig. 1", "it is", "it was", holds=np.bool_(True))
    run.claim("Fig. 2", "it may be", "unknown", holds=None, observation=3)
    assert not Run.load(run.folder).finished
    run.finish()
    for path in (run.folder, run.folder / "run.json", str(run.folder)):
        loaded = Run.load(path)
        for name in ("folder", "experiment", "config", "seed", "metrics", "figures", "claims", "versions", "seconds"):
            assert getattr(loaded, name) == getattr(run, name)
        assert loaded.finished
    assert loaded.metrics == {"accuracy": 0.5}
    assert loaded.config == {"seed": 3, "widths": [1, 2]}
    assert [(claim["verdict"], claim["observation"]) for claim in loaded.claims] == [("holds", None), ("not tested", 3)]


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        ([True, True], "holds"),
        ([False], "contradicted"),
        ([True, False], "mixed"),
        ([None, np.bool_(True)], "holds"),
        ([None, None], "not tested"),
        ([], "not tested"),
    ],
)
def test_verdict_sums_up_seeds(holds, expected):
    assert verdict(holds) == expected


def test_run_resumes_what_another_left(run):
    run.metric("accuracy", 0.5)
    run.figure("cov", *COVARIANCE, "A covariance")
    run.claim("Fig. 1", "it is", "it was", holds=True)
    with pytest.raises(RuntimeError, match="is in use by another process"):
        Run.resume(run.folder)
    run.close()
    again = Run.resume(run.folder)
    assert (again.config, again.started, again.finished) == (run.config, run.started, False)
    assert (again.metrics, again.figures, again.claims) == ({}, [], [])
    assert again.seconds == run.seconds
    with pytest.raises(RuntimeError, match="is in use by another process"):
        Run.resume(run.folder)


def test_run_redraws_from_its_record_without_torch(run):
    run.figure("cov", plotting.covariance_figure, {"matrices": [torch.randn(3, 3)], "titles": ["M=3"]}, "A covariance")
    run.close()
    png = (run.folder / "cov.png").read_bytes()
    (run.folder / "cov.png").unlink()
    code = (
        "import sys; from experiments.common.record import Run; "
        "print(Run.load(sys.argv[1]).redraw()[0].name); sys.exit('torch' in sys.modules)"
    )
    root = Path(record.__file__).parents[2]
    command = [sys.executable, "-c", code, str(run.folder.resolve())]
    assert subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout == "cov.png\n"
    assert (run.folder / "cov.png").read_bytes() == png
    with pytest.raises(ValueError, match="names must be of cov, got 'other'"):
        run.redraw(["other"])


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"draw": "os:system", "data": {"command": "false"}}', '{"draw": "experiments.cli:x", "data": {}}'],
)
def test_run_redraw_refuses_damaged_data(run, content):
    run.figure("cov", *COVARIANCE, "A covariance")
    (run.folder / "cov.json").write_text(content)
    with pytest.raises(ValueError, match=r"cov\.json must be a figure's data, got"):
        run.redraw()


def test_encode_keeps_arrays():
    value = {
        "a": np.array([[1.0, np.nan], [np.inf, 1 / 3]], dtype=np.float32),
        "b": torch.tensor([1, 2]),
        "c": [np.array([True]), ("x", None, 1.5)],
        "d": np.zeros((0, 2)),
    }
    result = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    np.testing.assert_allclose(result["a"], value["a"], rtol=5e-6)
    assert result["a"].dtype == np.float32
    assert result["b"].tolist() == [1, 2]
    assert result["c"][0].dtype == bool
    assert result["c"][1] == ["x", None, 1.5]
    assert result["d"].shape == (0, 2)
    with pytest.raises(TypeError, match="value must be JSON-like, an array or a tensor, got object"):
        encode(object())


def test_name_of_refuses_what_cannot_be_found_again():
    assert name_of(plotting.covariance_figure) == "bsfast.plotting.branches:covariance_figure"
    for draw in (plt_function, lambda: None):
        with pytest.raises(ValueError, match=r"must be a public function of bsfast\.plotting or experiments, got"):
            name_of(draw)


def plt_function():
    """Not in an experiment."""


def test_run_says_versions_and_machine(run):
    stored = json.loads((run.folder / "run.json").read_text())
    assert stored["seed"] == 3
    assert {"bsfast", "torch", "numpy", "python", "cpu", "threads"} <= stored["versions"].keys()
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["versions"]["threads"] == torch.get_num_threads()


def test_run_figure_replaces_one_of_the_same_name(run):
    run.figure("cov", *COVARIANCE, "first")
    run.figure("cov", *COVARIANCE, "second")
    assert [figure["title"] for figure in run.figures] == ["second"]
    assert (run.folder / "cov.png").read_bytes().startswith(b"\x89PNG")


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
        run.figure("a/b", *COVARIANCE, "")
    with pytest.raises(ValueError, match="observation must be 1 to 8, got 9"):
        run.claim("Fig. 1", "it is", "it was", holds=True, observation=9)
    with pytest.raises(FileNotFoundError, match=r"must be a run's folder with run\.json in it, got '.*nothing'"):
        Run.load(tmp_path / "nothing")
    for content in ("{", "[]", "{}"):
        (run.folder / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json must be the record of a run, got"):
            Run.load(run.folder)
