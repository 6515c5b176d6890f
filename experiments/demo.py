"""``python -m experiments demo``: the toys in full and a small classifier, in under ten minutes on two cores."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from experiments.classifier.command import find_data
from experiments.common import arguments, resumable
from experiments.common.record import Run
from experiments.common.report import write_report
from experiments.toy.command import record_toys

HELP = "the toys in full and a small classifier, under 10 minutes on 2 cores"
_TRAINING_SECONDS = 270.0
_LIMIT_SECONDS = 340.0  # of data, toys and training; evaluation, figures and speed come on top
# One M: further ones, for Figures 5, left, and 17, would take more than the time there is.
IMAGES: dict[str, Any] = {"epochs": 4, "speed_limit": 30.0}
DIGITS: dict[str, Any] = {"epochs": 24, "speed_limit": 30.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    arguments.add_common(parser)
    parser.add_argument("--data", type=Path, metavar="PATH", help=arguments.DATA_HELP)


def act(parsed: argparse.Namespace, command: str) -> Path:
    """Run both, and write one report about them."""
    from experiments.classifier.run import run
    from experiments.classifier.setup import choose

    started = time.perf_counter()
    dataset = find_data(parsed.data)
    toys = record_toys(parsed.out, command, parsed.seed)
    left = _LIMIT_SECONDS - (time.perf_counter() - started)
    given = (DIGITS if dataset.name == "digits" else IMAGES) | {
        "seed": parsed.seed,
        "time_limit": max(min(_TRAINING_SECONDS, left), 10.0),
    }
    setup = choose("cpu", given, train_images=len(dataset.train_images), test_images=len(dataset.test_images))
    data = None if parsed.data is None else str(parsed.data.resolve())
    classifier = Run("classifier", {"command": command, "data": data} | setup.to_json(), parsed.out)
    resumable.complete(classifier, lambda: run(classifier, dataset, setup))
    return write_report([toys, classifier], parsed.out / "report.html")
