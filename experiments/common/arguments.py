"""Types of command-line arguments: text to value, or a message that says what was expected and what came."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUDGETS = ("auto", "cpu", "gpu", "paper")
DATA_HELP = "folder or archive of 32 x 32 images in class folders, or cifar-10-batches-py (default: BSFAST_DATA)"


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every experiment."""
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything random (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs go (%(default)s)")


def given(parsed: argparse.Namespace) -> dict[str, Any]:
    """What the command line holds, by name, where options that it does not hold are suppressed."""
    return {name: value for name, value in vars(parsed).items() if name != "act"}


def count(text: str) -> int:
    """At least 1."""
    return _number(text, int, "an integer of at least 1", lambda value: value >= 1)


def from_zero(text: str) -> int:
    """At least 0."""
    return _number(text, int, "an integer of at least 0", lambda value: value >= 0)


def seed(text: str) -> int:
    """A seed, with room for a few more above it."""
    return _number(text, int, "an integer from 0 to 2**62", lambda value: 0 <= value <= 2**62)


def positive(text: str) -> float:
    """Finite and above 0."""
    return _number(text, float, "a finite number above 0", lambda value: 0 < value < float("inf"))


def not_negative(text: str) -> float:
    """Finite and at least 0."""
    return _number(text, float, "a finite number of at least 0", lambda value: 0 <= value < float("inf"))


def positive_or_auto(text: str) -> float | None:
    """Finite and above 0, or None for the word auto."""
    if text == "auto":
        return None
    return _number(text, float, "auto or a finite number above 0", lambda value: 0 < value < float("inf"))


def counts(text: str) -> tuple[int, ...]:
    """Integers of at least 1."""
    rule = "integers of at least 1 with commas between, such as 2,4,8"
    return tuple(_number(word, int, rule, lambda value: value >= 1) for word in text.split(","))


def _number(text: str, kind: type, rule: str, accepts: Callable[[Any], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
    return value
