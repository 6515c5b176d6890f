"""Command line of the experiments: list, run and report the paper's figures."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bsfast import keep_freed_memory
from experiments import demo, figure
from experiments.class_transfer import command as class_transfer
from experiments.class_transfer import sliders_command as sliders
from experiments.classifier import command as classifier
from experiments.common.interrupt import Stopped
from experiments.common.report import write_report
from experiments.common.summary import write_summary
from experiments.hessian import command as hessian
from experiments.toy import command as toy

_FIGURES = """\
figures of the paper (arXiv 2206.05810); each also by its number, as in: python -m experiments figure 7
  1            toy          the branched network, drawn
  2, 3, 4      toy          branches compete for the points of a toy problem
  5 left, 17   classifier   active and silent branches, outputs, covariances against M (--all-m)
  5 right      hessian      Hessian of the first layer before and after training, of a classifier that is there
  5 middle, 6  classifier   covariance of the branches, and what each says about each image
  7            classifier   confidence of each branch in the true class
  8, 16        classifier   the images that two branches are surest of
  9 to 15      class-transfer  images taken apart by branches of a generator, and what their parts are
  18 to 21     class-transfer  all parts of animals; segmented eyes

The classifier takes CIFAR-10 from the folder that the environment variable BSFAST_DATA names (default ./data), and
scikit-learn's digits if there is none. Ctrl-C saves the training and says how to go on.
"""
_COMMANDS: dict[str, ModuleType] = {
    "toy": toy,
    "classifier": classifier,
    "hessian": hessian,
    "class-transfer": class_transfer,
    "sliders": sliders,
    "demo": demo,
    "figure": figure,
}
_STOPPED = 130  # as shells report what Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and print the path of what it made.

    Args:
        arguments: Words after ``python -m experiments``; those of the process by default.

    Returns:
        Exit status: 0 when the command succeeded, 1 when it could not, 130 when it was stopped; wrong arguments exit
        with 2.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    keep_freed_memory()
    try:
        made = main_report(words)
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"python -m experiments {words[0]}: {stop or 'stopped'}", file=sys.stderr)
        return _STOPPED
    except (ValueError, RuntimeError, OSError) as error:
        print(f"python -m experiments {words[0]}: {error}", file=sys.stderr)
        return 1
    print(made)
    return 0


def main_report(words: Sequence[str]) -> Path:
    """Run one command.

    Args:
        words: Its name and options.

    Returns:
        What it made: a report, or a figure.
    """
    parsed = _parser().parse_args(words)
    return parsed.act(parsed, "python -m experiments " + shlex.join(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Reproduce the paper's figures. Each run writes a folder: figures and their data, report.html.",
        epilog=_FIGURES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(act=module.act)
    report = commands.add_parser("report", help="one HTML page about runs that are there")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    report.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="where it goes (%(default)s)")
    report.set_defaults(act=lambda parsed, _command: write_report(parsed.runs, parsed.out / "report.html"))
    summary = commands.add_parser("summary", help="one JSON file: numbers of runs that differ in their seed")
    summary.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    summary.add_argument("--out", type=Path, default=Path("summary.json"), metavar="FILE", help="(%(default)s)")
    summary.set_defaults(act=lambda parsed, _command: write_summary(parsed.runs, parsed.out))
    return parser
