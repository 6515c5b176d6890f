"""Summaries of runs: mean and spread by hand, and which runs are not alike."""

import json

import pytest

from experiments import cli
from experiments.common.record import Run
from experiments.common.summary import write_summary


def run_of(folder, seed, score, experiment="toy", **config):
    run = Run(experiment, {"seed": seed, "command": f"toy --seed {seed}", "steps": 5} | config, folder)
    run.metric("scores", {"branches": {"S1": score, "name": "x"}})
    run.metric("steps", 5)
    run.metric("history", [1, 2])
    run.metric("identity", {"seed": seed})
    run.metric("lost", float("nan"))
    run.claim("Fig. 1", "it works", f"{score}", score > 1)
    run.finish()
    return run


def test_write_summary_has_mean_and_spread(tmp_path):
    runs = [run_of(tmp_path, seed, score) for seed, score in enumerate((1.0, 2.0, 6.0))]
    summary = json.loads(write_summary(runs, tmp_path / "new" / "summary.json").read_text())
    assert summary["numbers"]["scores.branches.S1"] == {"mean": 3, "deviation": 2.64575, "values": [1, 2, 6]}
    assert summary["numbers"]["steps"] == {"mean": 5, "deviation": 0, "values": [5, 5, 5]}
    assert set(summary["numbers"]) == {"scores.branches.S1", "steps"}
    assert summary["seeds"] == [0, 1, 2]
    assert summary["commands"] == [f"toy --seed {seed}" for seed in range(3)]
    assert summary["config"] == {"steps": 5}
    assert summary["claims"][0]["verdict"] == ["contradicted", "holds", "holds"]
    one = json.loads(write_summary(runs[:1], tmp_path / "one.json").read_text())
    assert one["numbers"]["steps"] == {"mean": 5, "deviation": None, "values": [5]}


def test_write_summary_refuses_runs_that_are_not_alike(tmp_path, capsys):
    one = run_of(tmp_path, 0, 1.0)
    with pytest.raises(ValueError, match=r"runs must differ in their seed only, got .* with another steps than"):
        write_summary([one, run_of(tmp_path, 1, 1.0, steps=6)], tmp_path / "summary.json")
    with pytest.raises(ValueError, match="with another experiment, width than"):
        write_summary([one, run_of(tmp_path, 1, 1.0, experiment="other", width=1)], tmp_path / "summary.json")
    with pytest.raises(ValueError, match="runs must be at least one run, got none"):
        write_summary([], tmp_path / "summary.json")
    assert cli.main(["summary", str(one.folder), "--out", str(tmp_path / "cli.json")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cli.json")
