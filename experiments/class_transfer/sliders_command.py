"""``python -m experiments sliders RUN``: the interactive page of a class transfer that is there."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "interactive page of a class transfer: one slider per branch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run of class-transfer")
    parser.add_argument("--data", type=Path, metavar="PATH", help="where the run's folder or archive of images is now")


def act(parsed: argparse.Namespace, _command: str) -> Path:
    """Write the page into the run's folder.

    Args:
        parsed: What :func:`add_arguments` parsed.

    Returns:
        The page.
    """
    from dataclasses import replace

    from experiments.class_transfer.data import load
    from experiments.class_transfer.model import load_trained
    from experiments.class_transfer.run import made_by
    from experiments.class_transfer.sliders import SLIDERS, write_sliders
    from experiments.common.record import Run

    decomposer, classes, setup = load_trained(parsed.run)
    setup = setup if parsed.data is None else replace(setup, data=str(parsed.data.resolve()))
    dataset = load(setup)
    if dataset.classes != classes:
        raise ValueError(
            f"sliders: the data must have the run's classes {', '.join(classes)}, got {', '.join(dataset.classes)}"
        )
    record = Run.load(parsed.run)
    if "steps" not in record.metrics:
        raise ValueError(f"sliders: {parsed.run} must be a run that has ended; go on with class-transfer --resume")
    return write_sliders(record.folder / SLIDERS, decomposer, dataset, made_by(setup, dataset, record.metrics["steps"]))
