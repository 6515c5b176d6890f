"""Record one run of an experiment: a folder with its figures and one JSON file that says everything else.

Reading a record back needs neither PyTorch nor matplotlib, so a report can be written on another machine.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import sys
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_DPI = 130
_FILE = "run.json"


class Run:
    """One run of one experiment, written to ``<root>/<experiment>-<timestamp>/``.

    ``run.json`` is replaced as a whole after every call, so a run that was interrupted still reads back, with
    ``finished`` false.

    Args:
        experiment: Name of the experiment, such as ``"toy"``; becomes part of the folder's name.
        config: Everything that was chosen, JSON-like; ``config["seed"]`` is recorded as the run's seed.
        root: Folder that holds all runs; made if missing.

    Attributes:
        folder: The run's folder.
        experiment: As given.
        config: As given, in JSON types.
        metrics: Name to value, in JSON types.
        figures: One dict (name, file, title, note) a figure, in the order drawn.
        claims: One dict (figure, claim, measured, holds) a claim of the paper; ``holds`` None means not tested.
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
        run._clock = None
        return run

    def metric(self, name: str, value: Any) -> None:
        """Record a measured value: a number, text, array, or lists and dicts of these; a later call replaces it."""
        self.metrics[name] = to_json(value)
        self._write()

    def figure(self, name: str, figure: Figure, title: str, note: str = "") -> None:
        """Draw a figure to ``<name>.png`` in the run's folder.

        Args:
            name: File name without suffix; a later figure of one name replaces the earlier.
            figure: A matplotlib figure; need not come from pyplot.
            title: One line, shown above the figure in the report.
            note: What was done and what to look at, shown under the figure.

        Raises:
            ValueError: If the name is not usable as a file name.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        if not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"Run.figure: name must have letters, digits, - and _ only, got {name!r}")
        content = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(content, dpi=FIGURE_DPI, format="png", bbox_inches="tight", facecolor="white")
        file = f"{name}.png"
        write_atomically(self.folder / file, content.getvalue())
        self.figures = [entry for entry in self.figures if entry["name"] != name]
        self.figures.append({"name": name, "file": file, "title": title, "note": note})
        self._write()

    def claim(self, figure: str, claim: str, measured: str, holds: bool | None) -> None:
        """Record a claim of the paper next to what this run measured.

        Args:
            figure: Where the paper says it, such as ``"Fig. 5 left"``.
            claim: The claim, with the criterion used to judge it.
            measured: What was measured, in words and numbers.
            holds: Whether the criterion is met; None where this run cannot tell.
        """
        entry = {
            "figure": figure,
            "claim": claim,
            "measured": measured,
            "holds": None if holds is None else bool(holds),
        }
        self.claims.append(to_json(entry))
        self._write()

    def finish(self) -> None:
        """Mark the run as complete."""
        self.finished = True
        self._write()

    def _write(self) -> None:
        if self._clock is not None:
            self.seconds = round(time.perf_counter() - self._clock, 3)
        stored = {name: getattr(self, name) for name in _STORED} | {"seed": self.seed}
        write_atomically(self.folder / _FILE, (json.dumps(stored, indent=1, allow_nan=False) + "\n").encode())


_STORED = ("experiment", "config", "started", "seconds", "finished", "versions", "metrics", "claims", "figures")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file in one step: readers see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
