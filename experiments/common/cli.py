"""Command line of the experiments: list, run and report the paper's figures."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.record import Run
from experiments.common.report import write_report

_FIGURES = """\
figures of the paper (arXiv 2206.05810):
  2, 3, 4      toy          branches compete for the points of a toy problem
  5 left       classifier   active and silent branches against M (--all-m 2,4,8,16,32)
  5 middle, 6  classifier   covariance of the branches, and what each says about each image

The classifier takes CIFAR-10 from the folder that the environment variable BSFAST_DATA names (default ./data), and
scikit-learn's digits if there is none.
"""
_DEMO_TRAINING_SECONDS = 270.0
_DEMO_SPEED_SECONDS = 30.0
_DEMO_LIMIT_SECONDS = 340.0  # of data, toys and training; evaluation, figures and speed come on top


class Demo(NamedTuple):
    """Scale of the demo's classifier; the time budgets above hold whatever the machine."""

    branches: int
    all_m: tuple[int, ...]
    train_images: int
    test_images: int
    epochs: int
    widths: tuple[int, ...] = (4, 8, 16, 16)
    speed_repeats: int = 20


# The paper's hard clamp with this short schedule ends at chance: f drifts as a whole until all logits of nearly every
# image are beyond 1 and get no gradient. The one-sided clamp has the same minima and lets them back; reports say it.
_DEMO_CLAMP = "one_sided"
# One M: further ones, for Figure 5, left, would take more than the 10 minutes that the demo has.
_DEMO_IMAGES = Demo(branches=16, all_m=(), train_images=10_000, test_images=2000, epochs=4)
_DEMO_DIGITS = Demo(branches=16, all_m=(), train_images=1437, test_images=360, epochs=24)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words after ``python -m experiments``; those of the process by default.

    Returns:
        Exit status: 0 when the command succeeded, 1 when it could not; wrong arguments exit with 2.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parser().parse_args(words)
    command = "python -m experiments " + shlex.join(words)
    try:
        report = parsed.act(parsed, command)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"python -m experiments {words[0]}: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Reproduce the paper's figures. Each run writes a folder: figures, run.json, report.html.",
        epilog=_FIGURES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="experiments", metavar="COMMAND", required=True)
    toy = _add(commands, "toy", "Figures 2 to 4: toy regression", _toy)
    toy.add_argument("--trials", type=_count, default=1000, help="random initialisations for each M (%(default)s)")
    _add_classifier(_add(commands, "classifier", "Figures 5 and 6: image classifier", _classifier))
    demo = _add(commands, "demo", "the toys in full and a small classifier, under 10 minutes on 2 cores", _demo)
    demo.add_argument("--data", type=Path, metavar="PATH", help=_DATA_HELP)
    report = _add(commands, "report", "one HTML page about runs that are there", _report)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    return parser


_DATA_HELP = "folder or archive of 32 x 32 images in class folders, or cifar-10-batches-py (default: BSFAST_DATA)"


def _add(
    commands: Any, name: str, help_text: str, act: Callable[[argparse.Namespace, str], Path]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help_text, description=help_text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=_seed, default=0, help="seed of everything random (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs go (%(default)s)")
    parser.set_defaults(act=act)
    return parser


def _add_classifier(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--branches", type=_count, default=16, metavar="M", help="branches of the main model (%(default)s)")
    add("--all-m", type=_counts, default=(), metavar="M,M,...", help="further models, for Figure 5, left")
    add("--widths", type=_widths, default="paper", help="paper, scaled, cpu-small, or a,b,c,d (%(default)s)")
    add(
        "--epochs",
        type=_count,
        default=30,
        help="passes over the training images (%(default)s; the paper's scale: 200)",
    )
    add("--batch-size", type=_count, default=128, metavar="N", help="images a step (%(default)s)")
    add("--lr", type=_positive, default=0.1, help="peak learning rate (%(default)s)")
    add("--weight-decay", type=_not_negative, default=5e-4, help="L2 factor (%(default)s)")
    add("--clamp", choices=("hard", "one_sided", "none"), default="hard", help="clamp of f in the loss (%(default)s)")
    add("--readout-scale", type=_scale, default=1.0, help="factor on the readout's initial values, or auto: 1/sqrt(M)")
    add("--train-images", type=_count, metavar="N", help="random subset of the training images (default: all)")
    add("--test-images", type=_count, metavar="N", help="random subset of the test images (default: all)")
    add("--data", type=Path, metavar="PATH", help=_DATA_HELP)
    add(
        "--budget", type=_positive, metavar="SECONDS", help="limit of the training time; the schedule fits itself to it"
    )
    add("--speed-repeats", type=_from_zero, default=20, metavar="N", help="rounds of fused against loop (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    add("--checkpoints", type=Path, metavar="FOLDER", help="save after each epoch here, and continue from what is here")


def _toy(parsed: argparse.Namespace, command: str) -> Path:
    record = _run_toy(parsed, command, parsed.trials)
    return write_report([record], record.folder / "report.html")


def _classifier(parsed: argparse.Namespace, command: str) -> Path:
    from experiments.classifier.model import WIDTHS

    _check_device(parsed.device)
    dataset = _dataset(parsed.data)
    widths = WIDTHS[parsed.widths] if isinstance(parsed.widths, str) else parsed.widths
    setup = {
        "branches": parsed.branches,
        "all_m": parsed.all_m,
        "widths": widths,
        "clamp": parsed.clamp,
        "readout_scale": parsed.readout_scale,
        "train_images": parsed.train_images,
        "test_images": parsed.test_images,
        "speed_repeats": parsed.speed_repeats,
        "device": parsed.device,
        "checkpoints": parsed.checkpoints,
    }
    options = {
        "epochs": parsed.epochs,
        "batch_size": parsed.batch_size,
        "lr": parsed.lr,
        "weight_decay": parsed.weight_decay,
        "budget": parsed.budget,
    }
    record = _run_classifier(parsed, command, dataset, setup, options)
    return write_report([record], record.folder / "report.html")


def _demo(parsed: argparse.Namespace, command: str) -> Path:
    started = time.perf_counter()
    dataset = _dataset(parsed.data)
    records = [_run_toy(parsed, command, trials=1000)]
    scale = _DEMO_DIGITS if dataset.name == "digits" else _DEMO_IMAGES
    left = _DEMO_LIMIT_SECONDS - (time.perf_counter() - started)
    budget = max(min(_DEMO_TRAINING_SECONDS, left), 10.0)
    setup = {
        "branches": scale.branches,
        "all_m": scale.all_m,
        "widths": scale.widths,
        "clamp": _DEMO_CLAMP,
        "train_images": min(scale.train_images, len(dataset.train_images)),
        "test_images": min(scale.test_images, len(dataset.test_images)),
        "speed_repeats": scale.speed_repeats,
        "speed_limit": _DEMO_SPEED_SECONDS,
    }
    options = {"epochs": scale.epochs, "budget": budget}
    records.append(_run_classifier(parsed, command, dataset, setup, options))
    return write_report(records, parsed.out / "report.html")


def _report(parsed: argparse.Namespace, _command: str) -> Path:
    return write_report(parsed.runs, parsed.out / "report.html")


def _run_toy(parsed: argparse.Namespace, command: str, trials: int) -> Run:
    from experiments.toy.run import run

    record = Run("toy", {"command": command, "seed": parsed.seed, "trials": trials}, parsed.out)
    run(record, seed=parsed.seed, trials=trials)
    record.finish()
    return record


def _run_classifier(
    parsed: argparse.Namespace, command: str, dataset: Any, setup: dict[str, Any], options: dict[str, Any]
) -> Run:
    from experiments.classifier.run import Setup, run
    from experiments.common.training import Options

    record = Run("classifier", {"command": command, "seed": parsed.seed} | setup | options, parsed.out)
    run(record, dataset, Setup(**setup), Options(seed=parsed.seed, **options))
    record.finish()
    return record


def _dataset(path: Path | None) -> Any:
    from experiments.common.data import find_dataset, load_dataset

    dataset = find_dataset() if path is None else load_dataset(path)
    print(f"Data: {dataset.note}.")
    return dataset


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device must be one that this PyTorch has, got cuda; this PyTorch finds no CUDA device")


def _number(text: str, kind: type, rule: str, accepts: Callable[[Any], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
    return value


def _count(text: str) -> int:
    return _number(text, int, "an integer of at least 1", lambda value: value >= 1)


def _from_zero(text: str) -> int:
    return _number(text, int, "an integer of at least 0", lambda value: value >= 0)


def _seed(text: str) -> int:
    return _number(text, int, "an integer from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)


def _positive(text: str) -> float:
    return _number(text, float, "a finite number above 0", lambda value: 0 < value < float("inf"))


def _not_negative(text: str) -> float:
    return _number(text, float, "a finite number of at least 0", lambda value: 0 <= value < float("inf"))


def _scale(text: str) -> float | None:
    if text == "auto":
        return None
    return _number(text, float, "auto or a finite number above 0", lambda value: 0 < value < float("inf"))


def _counts(text: str) -> tuple[int, ...]:
    rule = "integers of at least 1 with commas between, such as 2,4,8"
    return tuple(_number(word, int, rule, lambda value: value >= 1) for word in text.split(","))


def _widths(text: str) -> str | tuple[int, ...]:
    if text in {"paper", "scaled", "cpu-small"}:
        return text
    words = text.split(",")
    if len(words) != 4 or not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
        raise argparse.ArgumentTypeError(
            f"must be paper, scaled, cpu-small or 4 integers of at least 1 with commas between, got {text!r}"
        )
    return tuple(map(int, words))
