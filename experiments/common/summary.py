"""Join runs that differ in their seed: mean and spread of every number they measured, as one small JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.common.atomic import write_atomically
from experiments.common.record import Run

_OF_A_RUN = {"seed", "command"}  # choices in which the runs may differ
_NOT_MEASURED = {"identity"}
_DIGITS = 6


def write_summary(runs: Sequence[Run | Path | str], path: Path | str) -> Path:
    """Write what runs of one experiment measured, with each seed and over all.

    Args:
        runs: Runs, or the folders to load them from, that were asked for the same but for the seed.
        path: The file to write; its folder is made if missing.

    Returns:
        The file.

    Raises:
        ValueError: If there are none, or they differ in the experiment or another choice.
    """
    if not runs:
        raise ValueError("write_summary: runs must be at least one run, got none")
    loaded = [run if isinstance(run, Run) else Run.load(run) for run in runs]
    first = loaded[0]
    for run in loaded[1:]:
        _check_alike(first, run)
    found = [dict(_numbers(run.metrics)) for run in loaded]
    shared = [name for name in found[0] if all(name in numbers for numbers in found)]
    claims = [
        {key: claim[key] for key in ("figure", "claim")}
        | {key: [run.claims[at][key] for run in loaded] for key in ("measured", "verdict")}
        for at, claim in enumerate(first.claims)
    ]
    summary = {
        "experiment": first.experiment,
        "commands": [run.config.get("command") for run in loaded],
        "config": {name: value for name, value in first.config.items() if name not in _OF_A_RUN},
        "data": [run.metrics.get("data") for run in loaded],
        "versions": [run.versions for run in loaded],
        "seconds": [run.seconds for run in loaded],
        "seeds": [run.seed for run in loaded],
        "numbers": {name: _spread([numbers[name] for numbers in found]) for name in shared},
        "claims": claims,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
    return path


def _check_alike(first: Run, run: Run) -> None:
    """Runs of another kind would be averaged into nonsense."""
    names = sorted(first.config.keys() | run.config.keys())
    differ = [n for n in names if n not in _OF_A_RUN and first.config.get(n) != run.config.get(n)]
    if run.experiment != first.experiment or [c["claim"] for c in run.claims] != [c["claim"] for c in first.claims]:
        differ.insert(0, "experiment")
    if differ:
        raise ValueError(
            f"write_summary: runs must differ in their seed only, got {run.folder} with another {', '.join(differ)} "
            f"than {first.folder}"
        )


def _numbers(metrics: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Numbers in dicts of dicts, by their joined keys; lists are of one run, such as its history."""
    if isinstance(metrics, dict):
        for key, value in metrics.items():
            if name or key not in _NOT_MEASURED:
                yield from _numbers(value, f"{name}.{key}" if name else key)
    elif isinstance(metrics, (int, float)) and not isinstance(metrics, bool) and math.isfinite(metrics):
        yield name, metrics


def _spread(values: list[float]) -> dict[str, Any]:
    spread = {"mean": fmean(values), "deviation": stdev(values) if len(values) > 1 else None, "values": values}
    return {name: _rounded(value) for name, value in spread.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
