"""``python -m experiments classifier``: choices on the command line to a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.common import arguments
from experiments.common.record import Run
from experiments.common.report import write_report

HELP = "Figures 5 to 8, 16 and 17: image classifiers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; those without a value on the command line do not appear in what is parsed."""
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add(
        "--budget",
        choices=("auto", "cpu", "gpu", "paper"),
        help="scale: cpu, minutes on 2 cores; gpu, aims at 10 minutes; paper, 200 epochs; auto (default) by the device",
    )
    add("--resume", type=Path, metavar="RUN", help="continue the run in this folder, with its own options")
    add("--seed", type=arguments.seed, help="seed of everything random (0)")
    add("--seeds", type=arguments.count, metavar="N", help="initialisations of each model, judged one by one (1)")
    add("--out", type=Path, metavar="FOLDER", help="where runs go (runs)")
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
    add("--device", choices=("cpu", "cuda"), help="where to train")
    add("--save-seconds", type=arguments.not_negative, metavar="SECONDS", help="time between checkpoints (60)")
    add("--speed-repeats", type=arguments.from_zero, metavar="N", help="rounds of fused against loop (20)")
    add("--tensorboard", action="store_true", default=argparse.SUPPRESS, help="also write TensorBoard logs")


def act(parsed: argparse.Namespace, command: str) -> Path:
    """Run or resume, and write the report.

    Args:
        parsed: What :func:`add_arguments` parsed.
        command: The command line, for the record.

    Returns:
        The report.
    """
    from experiments.classifier.setup import choose

    given = {name: value for name, value in vars(parsed).items() if name != "act"}
    resumed = given.pop("resume", None)
    if resumed is not None:
        return resume(resumed, given)
    data, out, budget = given.pop("data", None), given.pop("out", Path("runs")), given.pop("budget", "auto")
    dataset = find_data(data)
    setup = choose(budget, given, train_images=len(dataset.train_images), test_images=len(dataset.test_images))
    config = {"command": command, "data": None if data is None else str(data.resolve())} | setup.to_json()
    record = Run("classifier", config, out)
    return complete(record, dataset, setup)


def resume(folder: Path, given: dict[str, Any]) -> Path:
    """Continue a run from its checkpoint, with its own choices.

    Args:
        folder: The run's folder.
        given: Further options; only a new place of the data may be among them.

    Returns:
        The report.

    Raises:
        ValueError: If there are other options, or the run is of another experiment.
    """
    from experiments.classifier.setup import Setup

    data = given.pop("data", None)
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--resume continues with the run's own options and takes --data only, got {names} as well")
    record = Run.resume(folder)
    if record.experiment != "classifier":
        raise ValueError(f"--resume must name a run of the classifier, got one of {record.experiment}")
    setup = Setup.from_json(record.config)
    named = data or record.config.get("data")
    return complete(record, find_data(None if named is None else Path(named)), setup)


def complete(record: Run, dataset: Any, setup: Any) -> Path:
    """Run to the end and write the report; say how to go on if that is stopped."""
    from experiments.classifier.run import CHECKPOINT, run
    from experiments.common.interrupt import Stopped

    try:
        run(record, dataset, setup)
    except (Stopped, KeyboardInterrupt) as stop:
        going_on = f"go on with: python -m experiments classifier --resume {record.folder}"
        if not (record.folder / CHECKPOINT).exists():
            going_on = "there is no checkpoint yet"
        raise Stopped(f"{stop or 'stopped'}; {going_on}") from None
    finally:
        record.close()
    record.finish()
    return write_report([record], record.folder / "report.html")


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
