"""The committed record of the class transfer on synthetic animals, and what its README says about it."""

import json
import re
from pathlib import Path

import pytest

import experiments.class_transfer

FOLDER = Path(experiments.class_transfer.__file__).parent
RECORD = json.loads((FOLDER / "records" / "animals-cpu.json").read_text(encoding="utf-8"))
COLUMNS = {"S1": 3, "S1 null": 3, "S2 dB": 1, "S4": 1, "S5": 2, "S5 null": 2, "S6 rank": 1}  # and their decimals
CONTESTANTS = ("trained branches", "random branches", "Laplacian bands", "PCA", "ICA")


def scores(contestant, column):
    return RECORD["numbers"][f"scores.contestants.{contestant}.{column}"]


def cell(contestant, column):
    number, decimals = scores(contestant, column), COLUMNS[column]
    return f"{number['mean']:.{decimals}f} ± {number['deviation']:.{decimals}f}"


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_readme_has_the_scores_of_the_record(contestant):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"(?m)^\| {contestant} \| (.*) \|$", text)
    assert row.split(" | ") == [cell(contestant, column) for column in COLUMNS]


def test_record_is_of_three_seeds_and_says_whether_branches_specialise():
    assert RECORD["seeds"] == [0, 1, 2]
    assert RECORD["config"]["budget"] == "cpu"
    for score in ("S1", "S5"):
        trained, random = (scores(name, score)["values"] for name in ("trained branches", "random branches"))
        assert all(own > untrained for own, untrained in zip(trained, random, strict=True))
        assert max(scores("trained branches", f"{score} p")["values"]) < 0.01
    verdicts = [claim["verdict"] for claim in RECORD["claims"] if claim["figure"] == "layers"]
    assert verdicts == [["holds"] * 3] * 2


def test_record_has_fused_generators_faster_than_the_faster_loop():
    assert min(RECORD["numbers"]["fused_speedup.Training step"]["values"]) > 1


def test_record_names_no_path():
    assert not [command for command in RECORD["commands"] if "/" in command]
