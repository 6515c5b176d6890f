"""``python -m experiments hessian``."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.classifier.command import find_data
from experiments.common import arguments
from experiments.common.record import Run
from experiments.common.report import write_report
from experiments.common.resumable import CHECKPOINT

HELP = "Figure 5, right, and section 8: the Hessian of a classifier that is there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--run", type=Path, help="run of the classifier (default: the newest finished one with its checkpoint)"
    )
    arguments.add_common(parser)
    parser.add_argument(
        "--images",
        type=arguments.count,
        default=2000,
        metavar="N",
        help="training images that the loss is averaged over, at most (%(default)s)",
    )
    parser.add_argument(
        "--whole-branch-images",
        type=arguments.from_zero,
        default=128,
        metavar="N",
        help="those for the spectra of whole branches; 0 leaves these out (%(default)s)",
    )
    parser.add_argument(
        "--clamp", choices=("hard", "none"), help="clamp of f in the loss (none if the classifier's is, else hard)"
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help=arguments.DATA_HELP)


def act(parsed: argparse.Namespace, command: str) -> Path:
    """Measure, and write a report about the classifier and its Hessian.

    Args:
        parsed: What :func:`add_arguments` parsed.
        command: The command line, for the record.

    Returns:
        The report.
    """
    from experiments.classifier.setup import Setup
    from experiments.hessian.run import Choices, run

    classifier = Run.load(parsed.run) if parsed.run is not None else newest(parsed.out)
    if classifier.experiment != "classifier" or not (classifier.folder / CHECKPOINT).is_file():
        raise ValueError(
            f"--run must name a run of the classifier with its {CHECKPOINT}, got {classifier.folder}, a run of "
            f"{classifier.experiment}"
        )
    setup = Setup.from_json(classifier.config)
    named = parsed.data or classifier.config.get("data")
    dataset = find_data(None if named is None else Path(named))
    clamp = parsed.clamp or ("none" if setup.clamp == "none" else "hard")
    choices = Choices(parsed.images, parsed.whole_branch_images, clamp, parsed.seed)
    config = {"command": command, "run": str(classifier.folder), "data": None if named is None else str(named)}
    record = Run("hessian", config | choices._asdict(), parsed.out)
    try:
        run(record, classifier, dataset, setup, choices)
    finally:
        record.close()
    record.finish()
    return write_report([classifier, record], record.folder / "report.html")


def newest(out: Path) -> Run:
    """Find the newest finished run of the classifier that has its checkpoint.

    Args:
        out: Folder of runs.

    Returns:
        The run.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = []
    for folder in out.glob("classifier-*"):
        try:
            run = Run.load(folder)
        except (OSError, ValueError):
            continue
        if run.finished and (folder / CHECKPOINT).is_file():
            found.append(run)
    if not found:
        raise FileNotFoundError(
            f"--out must hold a finished run of the classifier with its {CHECKPOINT}, got {str(out)!r}; make one with "
            "python -m experiments classifier, or name one with --run"
        )
    return max(found, key=lambda run: run.started)
