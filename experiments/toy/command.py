"""``python -m experiments toy``."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.common import arguments
from experiments.common.record import Run
from experiments.common.report import write_report

HELP = "Figures 1 to 4: toy regression"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    arguments.add_common(parser)
    parser.add_argument(
        "--seeds", type=arguments.count, default=5, help="seeds that the claims are judged for (%(default)s)"
    )
    parser.add_argument(
        "--trials", type=arguments.count, default=1000, help="random initialisations for each M (%(default)s)"
    )


def act(parsed: argparse.Namespace, command: str) -> Path:
    """Run, and write the report."""
    record = record_toys(parsed.out, command, parsed.seed, parsed.seeds, parsed.trials)
    return write_report([record], record.folder / "report.html")


def record_toys(out: Path, command: str, seed: int = 0, seeds: int = 5, trials: int = 1000) -> Run:
    """Run the toys.

    Args:
        out: Where runs go.
        command: The command line, for the record.
        seed: First seed.
        seeds: Number of seeds.
        trials: Random starts for each M.

    Returns:
        The finished run.
    """
    from experiments.toy.run import run

    record = Run("toy", {"command": command, "seed": seed, "seeds": seeds, "trials": trials}, out)
    run(record, seed=seed, seeds=seeds, trials=trials)
    record.finish()
    return record
