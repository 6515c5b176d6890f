"""The command line: help, refusals that name expected and got, and each command at a tiny scale."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import cli, demo, figure
from experiments.common.record import Run

ROOT = Path(__file__).parents[2]
TINY = ["--widths", "1,1,1,1", "--branches", "2", "--epochs", "1", "--train-images", "32", "--batch-size", "32"]
QUICK = [*TINY, "--speed-repeats", "0", "--test-images", "40"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BSFAST_DATA", raising=False)
    return tmp_path


def exits(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def test_help_lists_figures_and_experiments(capsys):
    code, out, _ = exits(["--help"], capsys)
    assert code == 0
    for words in ("toy", "classifier", "demo", "figure", "report", "5 left, 17", "8, 16", "BSFAST_DATA"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["gan"], "invalid choice: 'gan'"),
        (["classifier", "--widths", "8,16"], "--widths: must be paper, scaled, cpu-small or 4 integers"),
        (["classifier", "--widths", "8,16,0,1"], "got '8,16,0,1'"),
        (["classifier", "--branches", "0"], "--branches: must be an integer of at least 1, got '0'"),
        (
            ["classifier", "--all-m", "2,x"],
            "--all-m: must be integers of at least 1 with commas between, such as 2,4,8",
        ),
        (["classifier", "--lr", "nan"], "--lr: must be a finite number above 0, got 'nan'"),
        (["classifier", "--weight-decay", "-1"], "--weight-decay: must be a finite number of at least 0, got '-1'"),
        (
            ["classifier", "--readout-scale", "big"],
            "--readout-scale: must be auto or a finite number above 0, got 'big'",
        ),
        (["classifier", "--clamp", "soft"], "invalid choice: 'soft' (choose from"),
        (["classifier", "--speed-repeats", "-1"], "--speed-repeats: must be an integer of at least 0, got '-1'"),
        (["classifier", "--budget", "free"], "invalid choice: 'free' (choose from"),
        (["toy", "--seed", "-1"], "--seed: must be an integer from 0 to 2**62, got '-1'"),
        (["figure", "22"], "invalid choice: 22 (choose from"),
        (["report"], "required: RUN"),
    ],
)
def test_main_refuses_arguments(arguments, message, capsys):
    code, _, err = exits(arguments, capsys)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nothing"], "report: Run.load: path must be a run's folder with run.json in it, got 'nothing'"),
        (
            ["classifier", "--data", "nothing"],
            "load_dataset: path must be an existing folder or archive, got 'nothing'",
        ),
        (["classifier", "--train-images", "99999"], "train_images must be at most 1437, all there are, got 99999"),
        (["classifier", "--resume", "nothing"], "path must be a run's folder with run.json in it, got 'nothing'"),
        (
            ["classifier", "--resume", "runs", "--batch-size", "3", "--lr", "1"],
            "--resume continues with the run's own options and takes --data only, got --batch-size, --lr as well",
        ),
    ],
)
def test_main_reports_what_cannot_be_done(arguments, message, capsys):
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_resume_refuses_the_run_of_another_experiment(capsys):
    folder = Run("toy", {}).folder
    assert cli.main(["classifier", "--resume", str(folder)]) == 1
    assert "--resume must name a run of classifier, got one of toy" in capsys.readouterr().err


def test_classifier_then_report_and_figure(own_folder, capsys):
    assert cli.main(["classifier", *QUICK, "--seed", "4", "--out", "out"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (folder,) = (own_folder / "out").iterdir()
    assert printed[-1] == f"out/{folder.name}/report.html"
    record = Run.load(folder)
    assert record.finished
    assert record.config["command"].startswith("python -m experiments classifier --widths 1,1,1,1")
    assert (record.seed, record.config["widths"], record.config["epochs"]) == (4, [1, 1, 1, 1], 1)
    assert record.config["batch_size"] == 32
    assert cli.main(["report", str(folder.relative_to(own_folder)), "--out", "again"]) == 0
    assert (own_folder / "again" / "report.html").read_bytes() == (folder / "report.html").read_bytes()

    drawn = (folder / "figure-7.png").read_bytes()
    (folder / "figure-7.png").unlink()
    capsys.readouterr()
    assert cli.main(["figure", "7", "--out", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"out/{folder.name}/{name}.png" for name in ("figure-7", "figure-7-centred", "figure-7-margin")
    ]
    assert (folder / "figure-7.png").read_bytes() == drawn
    assert cli.main(["figure", "2", "--run", str(folder)]) == 1
    assert f"--run must name a run with Figure 2, got {folder}, which has none" in capsys.readouterr().err


def test_figure_makes_a_run_where_there_is_none(own_folder, capsys, monkeypatch):
    made = []

    def run(words):
        made.append(list(words))
        monkeypatch.undo()
        monkeypatch.chdir(own_folder)
        assert cli.main([words[0], *QUICK, "--all-m", "1"]) == 0
        return next((own_folder / "runs").iterdir()) / "report.html"

    monkeypatch.setattr(figure, "make_run", run)
    assert cli.main(["figure", "5", "--budget", "cpu"]) == 0
    assert made == [["classifier", "--out", "runs", "--budget", "cpu", "--all-m"]]
    assert capsys.readouterr().out.splitlines()[-1].endswith("figure-5-middle.png")


def test_tensorboard_logs_each_model(own_folder, capsys):
    pytest.importorskip("tensorboard")
    assert cli.main(["classifier", *QUICK, "--tensorboard", "--out", "out"]) == 0
    (folder,) = (own_folder / "out").iterdir()
    assert [entry.name for entry in (folder / "tensorboard").iterdir()] == ["m2-seed0"]


def test_tensorboard_missing_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["classifier", *QUICK, "--tensorboard"]) == 1
    assert "--tensorboard needs the package tensorboard: pip install tensorboard" in capsys.readouterr().err


def start(arguments, folder):
    command = [sys.executable, "-m", "experiments", "classifier", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


SMALL = ["--widths", "1,1,1,1", "--branches", "2", "--epochs", "4", "--train-images", "128", "--batch-size", "8"]


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_not(own_folder):
    arguments = [*SMALL, "--speed-repeats", "0", "--test-images", "60", "--save-seconds", "0"]
    began = time.monotonic()
    assert start([*arguments, "--out", "whole"], own_folder).wait() == 0, (own_folder / "output").read_text()
    took = time.monotonic() - began
    moments = random.Random(3)
    words, kills = [*arguments, "--out", "killed"], 0
    while True:
        process = start(words, own_folder)
        try:
            assert process.wait(moments.uniform(0.4, 1.0) * took if kills < 3 else None) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        started = [str(file.parent) for file in (own_folder / "killed").glob("*/run.json")]
        words = ["--resume", *started] if started else words
    nets = {}
    for name in ("whole", "killed"):
        (folder,) = [file.parent for file in (own_folder / name).glob("*/run.json")]
        assert Run.load(folder).finished
        assert not list(folder.glob(".*"))
        nets[name] = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["net"]
    torch.testing.assert_close(nets["killed"], nets["whole"], rtol=0, atol=0)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(own_folder):
    process = start([*SMALL, "--epochs", "400", "--speed-repeats", "0", "--test-images", "60"], own_folder)
    output = own_folder / "output"
    while "epoch 1 of 400" not in output.read_text():
        assert process.poll() is None, output.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    (folder,) = (own_folder / "runs").iterdir()
    assert f"go on with: python -m experiments classifier --resume runs/{folder.name}" in output.read_text()
    assert (folder / "checkpoint.pt").exists()
    assert not Run.load(folder).finished


def test_demo_ends_with_the_report(own_folder, capsys, monkeypatch):
    calls = []

    def toy(record, *, seed, seeds, trials):
        calls.append((seed, trials))
        record.claim("Fig. 3", "a toy", "seen", holds=True)

    monkeypatch.setattr("experiments.toy.run.run", toy)
    small = {"branches": 2, "all_m": (1,), "train_images": 32, "test_images": 40, "epochs": 1, "widths": (1, 1, 1, 1)}
    monkeypatch.setattr(demo, "DIGITS", small | {"speed_repeats": 1})
    assert cli.main(["demo", "--seed", "5"]) == 0
    assert calls == [(5, 1000)]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Data: scikit-learn's digits")
    assert out[-1] == "runs/report.html"
    page = (own_folder / "runs" / "report.html").read_text()
    assert "a toy" in page
    assert "Figure 6" in page
