"""``python -m experiments figure N``: one figure of the paper, from a run that is there or from a new one."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.common import arguments
from experiments.common.record import Run

HELP = "one figure of the paper, from the newest run that has it, or from a new run"
EXPERIMENT = (
    dict.fromkeys((1, 2, 3, 4), "toy")
    | dict.fromkeys((5, 6, 7, 8, 16, 17), "classifier")
    | dict.fromkeys((*range(9, 16), *range(18, 22)), "class-transfer")
)
_FACES = (10, 13)  # figures of data sets of two classes
_NEED_ALL_M = (5, 17)
_SIGN = {5: "figure-5-left"}  # a run without it lacks the models that the figure needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("number", type=int, choices=sorted(EXPERIMENT), metavar="N", help="number in the paper")
    parser.add_argument("--run", type=Path, help="draw it again from this run's record; needs no PyTorch")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs are (%(default)s)")
    parser.add_argument("--budget", choices=arguments.BUDGETS, default="auto", help="scale of a new run (%(default)s)")
    parser.add_argument("--data", type=Path, metavar="PATH", help=arguments.DATA_HELP)


def act(parsed: argparse.Namespace, _command: str) -> Path:
    """Draw the figure.

    Args:
        parsed: What :func:`add_arguments` parsed.

    Returns:
        The last of its files; the others are printed.

    Raises:
        ValueError: If the run named does not have the figure.
    """
    number = parsed.number
    run = Run.load(parsed.run) if parsed.run is not None else find(parsed.out, number)
    if run is None:
        words = words_of_a_run(parsed)
        print(f"No run under {parsed.out} has Figure {number}: python -m experiments {shlex.join(words)}")
        run = Run.load(make_run(words).parent)
    names = names_of(run, number)
    if not names:
        raise ValueError(f"--run must name a run with Figure {number}, got {run.folder}, which has none")
    files = run.redraw(names)
    for file in files[:-1]:
        print(file)
    return files[-1]


def names_of(run: Run, number: int) -> list[str]:
    """Names of the parts of a figure in a run."""
    return [entry["name"] for entry in run.figures if re.fullmatch(rf"figure-{number}(-.*)?", entry["name"])]


def find(out: Path, number: int) -> Run | None:
    """Find the newest finished run that has a figure.

    Args:
        out: Folder of runs.
        number: The figure.

    Returns:
        The run, or None.
    """
    candidates = []
    for folder in out.glob(f"{EXPERIMENT[number]}-*"):
        try:
            run = Run.load(folder)
        except (OSError, ValueError):
            continue
        names = names_of(run, number)
        if run.finished and names and _SIGN.get(number, names[0]) in names:
            candidates.append(run)
    return max(candidates, key=lambda run: run.started, default=None)


def words_of_a_run(parsed: argparse.Namespace) -> list[str]:
    """Command line of a run that makes a figure."""
    words = [EXPERIMENT[parsed.number], "--out", str(parsed.out)]
    if words[0] != "toy":
        words += ["--budget", parsed.budget]
        data = "faces" if parsed.number in _FACES and parsed.data is None else parsed.data
        words += ["--data", str(data)] if data is not None else []
        words += ["--all-m"] if parsed.number in _NEED_ALL_M else []
    return words


def make_run(words: Sequence[str]) -> Path:
    """Run an experiment; return the path of its report."""
    from experiments.cli import main_report

    return main_report(words)
