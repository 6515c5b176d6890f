"""The command line: help, refusals that name expected and got, and each command at a tiny scale."""

import pytest

from experiments.common import cli
from experiments.common.record import Run

TINY = ["--widths", "1,1,1,1", "--branches", "2", "--epochs", "1", "--train-images", "32", "--batch-size", "32"]


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
    for words in ("toy", "classifier", "demo", "report", "5 left", "5 middle, 6", "BSFAST_DATA"):
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
        (["toy", "--seed", "-1"], "--seed: must be an integer from 0 to 2**63 - 1, got '-1'"),
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
        (["classifier", "--train-images", "99999"], "train_images must be in 1 to 1437 for digits, got 99999"),
    ],
)
def test_main_reports_what_cannot_be_done(arguments, message, capsys):
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_classifier_then_report(own_folder, capsys):
    assert cli.main(["classifier", *TINY, "--seed", "4", "--speed-repeats", "0", "--out", "out"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (folder,) = (own_folder / "out").iterdir()
    assert printed[-1] == f"out/{folder.name}/report.html"
    record = Run.load(folder)
    assert record.finished
    assert record.config["command"].startswith("python -m experiments classifier --widths 1,1,1,1")
    assert (record.seed, record.config["widths"], record.config["epochs"]) == (4, [1, 1, 1, 1], 1)
    assert cli.main(["report", str(folder.relative_to(own_folder)), "--out", "again"]) == 0
    assert (own_folder / "again" / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_demo_ends_with_the_report(own_folder, capsys, monkeypatch):
    calls = []

    def toy(record, *, seed, trials):
        calls.append((seed, trials))
        record.claim("Fig. 3", "a toy", "seen", holds=True)

    monkeypatch.setattr("experiments.toy.run.run", toy)
    monkeypatch.setattr(
        cli,
        "_DEMO_DIGITS",
        cli.Demo(
            branches=2, all_m=(1,), train_images=32, test_images=40, epochs=1, widths=(1, 1, 1, 1), speed_repeats=1
        ),
    )
    assert cli.main(["demo", "--seed", "5"]) == 0
    assert calls == [(5, 1000)]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Data: scikit-learn's digits")
    assert out[-1] == "runs/report.html"
    page = (own_folder / "runs" / "report.html").read_text()
    assert "a toy" in page
    assert "Figure 6" in page
