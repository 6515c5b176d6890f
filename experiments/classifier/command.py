"""``python -m experiments classifier``: choices on the command line to a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.common import arguments, resumable
from experiments.common.record import Run

HELP = "Figures 5 to 8, 16 and 17: image classifiers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; those without a value on the command line do not appear in what is parsed."""
    resumable.add_arguments(parser, "cpu, minutes on 2 cores; gpu, aims at 10 minutes; paper, 200 epochs")
    add = parser.add_argument
    add("--seeds", type=arguments.count, metavar="N", help="initialisations of each model, judged one by one (1)")
    add("--branches", type=arguments.count, metavar="M", help="branches of the main model (16)")
    add(
        "--all-m",
        type=arguments.counts,
        nargs="?",
        const=(2, 4, 8, 16, 32),
        metavar="M,M,...",
        help="further models, for Figures 5, left, and 17, trained in the same pass (2,4,8,16,32)",
    )
    add("--widths", type=widths, help="paper, scaled, cpu-small, or a,b,c,d")
    add("--epochs", type=arguments.count, help="passes over the training images (cpu: 6, gpu: 30, paper: 200)")
    add("--batch-size", type=arguments.count, metavar="N", help="images a step (128)")
    add("--lr", type=arguments.positive, help="peak learning rate (0.1)")
    add("--weight-decay", type=arguments.not_negative, help="L2 factor (5e-4)")
    add("--clamp", choices=("hard", "one_sided", "none"), help="clamp of f in the loss (paper: hard, else one_sided)")
    add(
        "--readout-scale",
        type=arguments.positive_or_auto,
        help="factor on the readout's initial values (1), or auto: 1/sqrt(M)",
    )
    add("--train-images", type=arguments.count, metavar="N", help="random subset of the training images")
    add("--test-images", type=arguments.count, metavar="N", help="random subset of the test images")
    add("--data", type=Path, metavar="PATH", help=arguments.DATA_HELP)
    add(
        "--time-limit",
        type=arguments.positive,
        metavar="SECONDS",
        help="limit of the training time; the schedule fits itself to it",
    )
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of the forward pass; fp16 scales the loss")
    add("--speed-repeats", type=arguments.from_zero, metavar="N", help="rounds of fused against loop (20)")


def act(parsed: argparse.Namespace, command: str) -> Path:
    """Run or resume, and write the report.

    Args:
        parsed: What :func:`add_arguments` parsed.
        command: The command line, for the record.

    Returns:
        The report.
    """
    from experiments.classifier.run import run
    from experiments.classifier.setup import Setup, choose

    given = arguments.given(parsed)
    if "resume" in given:
        record = resumable.resume("classifier", given)
        setup = Setup.from_json(record.config)
        named = given.get("data") or record.config.get("data")
        dataset = find_data(None if named is None else Path(named))
    else:
        data, out, budget = given.pop("data", None), given.pop("out", Path("runs")), given.pop("budget", "auto")
        dataset = find_data(data)
        setup = choose(budget, given, train_images=len(dataset.train_images), test_images=len(dataset.test_images))
        config = {"command": command, "data": None if data is None else str(data.resolve())} | setup.to_json()
        record = Run("classifier", config, out)
    return resumable.complete(record, lambda: run(record, dataset, setup))


def find_data(path: Path | None) -> Any:
    """Load the images at a path, or those that are found, and say which."""
    from experiments.common.data import find_dataset, load_dataset

    dataset = find_dataset() if path is None else load_dataset(path)
    print(f"Data: {dataset.note}.")
    return dataset


def widths(text: str) -> tuple[int, ...]:
    """Four widths, or the name of some."""
    from experiments.classifier.model import WIDTHS

    if text in WIDTHS:
        return WIDTHS[text]
    words = text.split(",")
    if len(words) != 4 or not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
        raise argparse.ArgumentTypeError(
            f"must be paper, scaled, cpu-small or 4 integers of at least 1 with commas between, got {text!r}"
        )
    return tuple(map(int, words))
