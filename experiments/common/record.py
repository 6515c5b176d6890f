"""Record one run of an experiment: a folder with its figures, their data, and one JSON file that says everything else.

Reading a record back needs neither PyTorch nor matplotlib, so a report can be written on another machine; drawing its
figures again needs matplotlib.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import math
import os
import platform
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.atomic import write_atomically
from experiments.common.drawing import decode, draw_png, encode, name_of
from experiments.common.observations import OBSERVATIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILE = "run.json"


class Run:
    """One run of one experiment, written to ``<root>/<experiment>-<timestamp>/``.

    ``run.json`` is replaced as a whole after every call, so a run that was interrupted still reads back, with
    ``finished`` false. While a process works on a run, another that wants to is refused.

    Args:
        experiment: Name of the experiment, such as ``"toy"``; becomes part of the folder's name.
        config: Everything that was chosen, JSON-like; ``config["seed"]`` is recorded as the run's seed.
        root: Folder that holds all runs; made if missing.

    Attributes:
        folder: The run's folder.
        experiment: As given.
        config: As given, in JSON types.
        metrics: Name to value, in JSON types.
        figures: One dict (name, file, data, title, note) a figure, in the order drawn.
        claims: One dict (figure, observation, claim, measured, verdict) a claim of the paper; ``observation`` is the
            number of one of its observations, or None; the verdict is a key of :data:`VERDICTS`.
        versions: Packages, machine and threads.
        started: Local time at the start, ISO 8601.
        seconds: Wall-clock time so far, in s.
        finished: Whether :meth:`finish` was reached.
    """

    def __init__(self, experiment: str, config: dict[str, Any], root: Path = Path("runs")) -> None:
        if not experiment or not experiment.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"Run: experiment must be a name of letters, digits, - and _, got {experiment!r}")
        started = datetime.now().astimezone()
        self.folder = _new_folder(Path(root), f"{experiment}-{started:%Y%m%d-%H%M%S}")
        self._unlock: Callable[[], object] | None = _lock(self)
        self.experiment = experiment
        self.config: dict[str, Any] = to_json(config)
        self.metrics: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []
        self.claims: list[dict[str, Any]] = []
        self.versions = describe_machine()
        self.started = started.isoformat(timespec="seconds")
        self.seconds = 0.0
        self.finished = False
        self._clock: float | None = time.perf_counter()
        self._write()

    @property
    def seed(self) -> int | None:
        """Seed of the run, from its configuration."""
        return self.config.get("seed")

    @classmethod
    def load(cls, path: Path | str) -> Run:
        """Read a run back from its folder or its ``run.json``.

        Args:
            path: The run's folder, or the file in it.

        Returns:
            The run. It can be extended; its clock stands still.

        Raises:
            FileNotFoundError: If there is no ``run.json``.
            ValueError: If the file is not a run's record.
        """
        file = Path(path)
        file = file / _FILE if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"Run.load: path must be a run's folder with {_FILE} in it, got {str(path)!r}")
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            run = cls.__new__(cls)
            run.folder = file.parent
            for name in _STORED:
                setattr(run, name, stored[name])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Run.load: {file} must be the record of a run, got {type(error).__name__}: {error}"
            ) from None
        run._clock = run._unlock = None
        return run

    @classmethod
    def resume(cls, path: Path | str) -> Run:
        """Take up a run where it was left: figures and claims are cleared, time goes on from what it took so far.

        Args:
            path: As for :meth:`load`.

        Returns:
            The run, not finished.

        Raises:
            FileNotFoundError: If there is no ``run.json``.
            ValueError: If the file is not a run's record.
            RuntimeError: If another process works on the run.
        """
        run = cls.load(path)
        run._unlock = _lock(run)
        run._clock = time.perf_counter() - run.seconds
        for left in run.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
        run.metrics, run.figures, run.claims, run.finished = {}, [], [], False
        run.versions = describe_machine()
        return run

    def metric(self, name: str, value: Any) -> None:
        """Record a measured value: a number, text, array, or lists and dicts of these; a later call replaces it."""
        self.metrics[name] = to_json(value)
        self._write()

    def figure(self, name: str, draw: Callable[..., Figure], data: dict[str, Any], title: str, note: str = "") -> None:
        """Write a figure's data to ``<name>.json`` and the figure drawn from it to ``<name>.png``.

        Args:
            name: File name without suffix; a later figure of one name replaces the earlier.
            draw: Makes the figure from the data; a public function of ``bsfast.plotting`` or ``experiments``, so that
                :meth:`redraw` finds it again.
            data: Arguments of ``draw``: arrays, tensors, numbers, text, and lists and dicts of these. Arrays are kept
                with six significant digits.
            title: One line, shown above the figure in the report.
            note: What was done and what to look at, shown under the figure.

        Raises:
            ValueError: If the name is not usable as a file name, or the function is not a public one of these packages.
        """
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"Run.figure: name must have letters, digits, - and _ only, got {name!r}")
        drawing = {"draw": name_of(draw), "data": encode(data)}
        png = draw_png(draw, decode(drawing["data"]))
        write_atomically(self.folder / f"{name}.json", (json.dumps(drawing, allow_nan=False) + "\n").encode())
        write_atomically(self.folder / f"{name}.png", png)
        self.figures = [entry for entry in self.figures if entry["name"] != name]
        self.figures.append({"name": name, "file": f"{name}.png", "data": f"{name}.json", "title": title, "note": note})
        self._write()

    def redraw(self, names: Sequence[str] | None = None) -> list[Path]:
        """Draw figures again from their data.

        Args:
            names: Which; all by default.

        Returns:
            The files written.

        Raises:
            ValueError: If the run has no figure of a name, or a figure's data is damaged.
        """
        known = {entry["name"]: entry for entry in self.figures}
        files = []
        for name in known if names is None else names:
            if name not in known:
                raise ValueError(f"Run.redraw: names must be of {', '.join(known)}, got {name!r}")
            source = self.folder / known[name]["data"]
            try:
                drawing = json.loads(source.read_text(encoding="utf-8"))
                module, _, function = drawing["draw"].partition(":")
                draw = getattr(importlib.import_module(module), function)
                name_of(draw)
                png = draw_png(draw, decode(drawing["data"]))
            except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
                raise ValueError(f"Run.redraw: {source} must be a figure's data, got {error}") from None
            files.append(self.folder / known[name]["file"])
            write_atomically(files[-1], png)
        return files

    def claim(
        self,
        figure: str,
        claim: str,
        measured: str,
        holds: bool | Sequence[bool | None] | None,
        *,
        observation: int | None = None,
    ) -> None:
        """Record a claim of the paper next to what this run measured.

        Args:
            figure: Where the paper says it, such as ``"Fig. 5 left"``.
            claim: The claim, with the criterion used to judge it.
            measured: What was measured, in words and numbers.
            holds: Whether the criterion is met, once or for each seed; None where that cannot be told.
            observation: Number of the paper's observation that this tests.

        Raises:
            ValueError: If there is no such observation.
        """
        if observation is not None and observation not in OBSERVATIONS:
            raise ValueError(f"Run.claim: observation must be 1 to {len(OBSERVATIONS)}, got {observation}")
        entry = {
            "figure": figure,
            "observation": observation,
            "claim": claim,
            "measured": measured,
            "verdict": verdict(holds if isinstance(holds, (list, tuple)) else [holds]),
        }
        self.claims.append(to_json(entry))
        self._write()

    def finish(self) -> None:
        """Mark the run as complete."""
        self.finished = True
        self._write()
        self.close()

    def close(self) -> None:
        """Let another process take the run up."""
        if self._unlock is not None:
            self._unlock()

    def _write(self) -> None:
        if self._clock is not None:
            self.seconds = round(time.perf_counter() - self._clock, 3)
        stored = {name: getattr(self, name) for name in _STORED} | {"seed": self.seed}
        write_atomically(self.folder / _FILE, (json.dumps(stored, indent=1, allow_nan=False) + "\n").encode())


_STORED = ("experiment", "config", "started", "seconds", "finished", "versions", "metrics", "claims", "figures")


VERDICTS = {
    "holds": "the criterion is met, with every seed that can tell",
    "contradicted": "it is not met, with any seed",
    "mixed": "it is met with some seeds and not with others",
    "not tested": "this run cannot tell",
}


def verdict(holds: Sequence[bool | None]) -> str:
    """Sum up whether a criterion is met with each seed, as a key of :data:`VERDICTS`."""
    known = [bool(held) for held in holds if held is not None]
    if not known:
        return "not tested"
    return "holds" if all(known) else "mixed" if any(known) else "contradicted"


def to_json(value: Any) -> Any:
    """Turn arrays, tensors, paths and tuples into JSON types; a number that is not finite becomes its name."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"Run: value must be JSON-like, an array or a tensor, got {type(value).__name__}")


def describe_machine() -> dict[str, Any]:
    """Tell the versions, the CPU and the threads of this process, without importing PyTorch."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if hasattr(torch, "get_num_threads") else os.cpu_count()
    return {
        "bsfast": _version("bsfast"),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": threads,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _lock(run: Run) -> weakref.finalize:
    """Keep other processes from working on a run until this one ends; the lock needs no file that could be left."""
    descriptor = os.open(run.folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RuntimeError(f"Run: {run.folder} is in use by another process") from None
    return weakref.finalize(run, os.close, descriptor)


def _new_folder(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, 1000):
        folder = root / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise RuntimeError(f"Run: cannot make a new folder {name} under {root}; 999 exist already")
