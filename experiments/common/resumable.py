"""Commands whose runs can be stopped and continued: the options they share, the beginning and the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.common import arguments
from experiments.common.interrupt import Stopped
from experiments.common.record import Run
from experiments.common.report import write_report

CHECKPOINT = "checkpoint.pt"  # in the run's folder


def add_arguments(parser: argparse.ArgumentParser, scale: str) -> None:
    """Add the options; those without a value on the command line do not appear in what is parsed.

    Args:
        parser: Gets them; its other options do not appear either.
        scale: What ``--budget`` says about each budget.
    """
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("--budget", choices=arguments.BUDGETS, help=f"scale: {scale}; auto (default) by the device")
    add("--resume", type=Path, metavar="RUN", help="continue the run in this folder, with its own options")
    add("--seed", type=arguments.seed, help="seed of everything random (0)")
    add("--out", type=Path, metavar="FOLDER", help="where runs go (runs)")
    add("--device", choices=("cpu", "cuda"), help="where to train")
    add("--save-seconds", type=arguments.not_negative, metavar="SECONDS", help="time between checkpoints (60)")
    add("--tensorboard", action="store_true", default=argparse.SUPPRESS, help="also write TensorBoard logs")


def resume(experiment: str, given: dict[str, Any]) -> Run:
    """Take up the run that ``--resume`` names.

    Args:
        experiment: That the run is of.
        given: The options; only a new place of the data may be among them besides.

    Returns:
        The run.

    Raises:
        ValueError: If there are other options, or the run is of another experiment.
    """
    others = ", ".join(f"--{name.replace('_', '-')}" for name in given if name not in {"resume", "data"})
    if others:
        raise ValueError(f"--resume continues with the run's own options and takes --data only, got {others} as well")
    record = Run.resume(given["resume"])
    if record.experiment != experiment:
        raise ValueError(f"--resume must name a run of {experiment}, got one of {record.experiment}")
    return record


def complete(record: Run, work: Callable[[], None]) -> Path:
    """Work to the end and write the report; say how to go on if that is stopped.

    Args:
        record: What the work records.
        work: Called once.

    Returns:
        The report.

    Raises:
        Stopped: If the work was.
    """
    try:
        work()
    except (Stopped, KeyboardInterrupt) as stop:
        going_on = f"go on with: python -m experiments {record.experiment} --resume {record.folder}"
        if not (record.folder / CHECKPOINT).exists():
            going_on = "there is no checkpoint yet"
        raise Stopped(f"{stop or 'stopped'}; {going_on}") from None
    finally:
        record.close()
    record.finish()
    return write_report([record], record.folder / "report.html")
