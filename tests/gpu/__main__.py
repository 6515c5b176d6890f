"""Tests and measurements on a machine with a GPU: ``python -m tests.gpu test sanitize bench``.

``make gpu`` and the targets beside it call this, with what their Python has. Nothing is fetched. The CUDA operators are
those that ``BSFAST_CUDA_LIBRARY`` names, or are built for this GPU. What has passed or is measured already, with the
same sources on the same device, is not done again, and nothing begins after ``--seconds``: call it again to go on.
The exit status is 1 if something failed, else 2 if work is left for another call, else 0.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.suite import ROOT, TESTS, Budget, run_tests, sanitize, say

BUILD = ROOT / "build" / "gpu"
RECORDS = ROOT / "tests" / "benchmarks" / "records"
NEEDED_BY_TESTS = ("pytest", "pytest_benchmark", "hypothesis")  # pyproject.toml has options of the second


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the works that the command line names, and return the exit status."""
    given = parse(arguments)
    needed = ["torch", *(NEEDED_BY_TESTS if {"test", "sanitize"} & set(given.works) else ())]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return say(
            f"tests.gpu: needs {', '.join(missing)}, got {sys.executable} without; try make PYTHON=...", error=True
        )
    from tests.gpu import machine

    if given.device == "cuda" and (why_not := machine.why_no_gpu()):
        return say(f"tests.gpu: needs a GPU: {why_not}", error=True)
    make_importable()
    budget = Budget(given.seconds)
    if given.device == "cuda" and (why_not := find_library()):
        return say(f"tests.gpu: needs the CUDA operators: {why_not}", error=True)
    from tests.gpu.record import Record

    host = machine.describe(given.device) | ({"tiny": True} if given.tiny else {})
    record = Record(given.records, host, digest(given.device))
    works: dict[str, Callable[..., int]] = {"test": run_tests, "sanitize": sanitize, "bench": bench}
    failed = sum(works[work](given, record, budget) for work in given.works)
    say(f"record: {record.path}")
    return 1 if failed else 2 if budget.cut_off else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.gpu", description=__doc__)
    parser.add_argument("works", nargs="+", choices=["test", "sanitize", "bench"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run, to test the scripts")
    parser.add_argument("--full", action="store_true", help="measure everything, not only what matters most")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes and two rounds, to test the scripts")
    parser.add_argument("--seconds", type=float, default=480, help="nothing begins later")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="test files, in the folder tests")
    return parser.parse_args(arguments)


def make_importable() -> None:
    """Let Python find the version of a clone that is not installed, as an installation would."""
    try:
        importlib.metadata.version("bsfast")
    except importlib.metadata.PackageNotFoundError:
        subprocess.run([sys.executable, "setup.py", "-q", "egg_info"], cwd=ROOT, check=True)
        importlib.invalidate_caches()


def find_library() -> str | None:
    """Build the CUDA operators for this GPU unless a library is named; say why they or Triton's cannot be used."""
    if named := os.environ.get("BSFAST_CUDA_LIBRARY"):
        os.environ["BSFAST_CUDA_LIBRARY"] = str(Path(named).absolute())  # works run in other folders
    else:
        if missing := missing_to_build():
            return f"{', '.join(missing)} not found; BSFAST_CUDA_LIBRARY may name a library built elsewhere"
        settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DBSFAST_CUDA=ON", "-DBSFAST_CUDA_ARCHITECTURES=native"]
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *settings],
            ["cmake", "--build", str(BUILD), "--target", "bsfast_cuda"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{' '.join(command[:2])} must succeed, got\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        os.environ["BSFAST_CUDA_LIBRARY"] = str(BUILD / "libbsfast_cuda.so")
    from bsfast.ops import backend

    return backend.native_why_not("cuda") or backend.triton_why_not()


def missing_to_build() -> list[str]:
    """What CMakeLists.txt asks for and this machine lacks."""
    missing = [tool for tool in ("cmake", "ninja", "nvcc", "c++") if shutil.which(tool) is None]
    missing += ["Python's package pybind11"] if importlib.util.find_spec("pybind11") is None else []
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return [*missing, *([] if headers.exists() else [str(headers)])]


def digest(device: str) -> str:
    """Digest of the sources and, on a GPU, of the library."""
    folders = ("bsfast", "csrc", "experiments/classifier", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths = sorted(path for path in paths if path.suffix in {".py", ".h", ".cuh", ".cu", ".cpp"})
    paths += [ROOT / "CMakeLists.txt"]
    paths += [Path(os.environ["BSFAST_CUDA_LIBRARY"])] if device == "cuda" else []
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def bench(given: argparse.Namespace, record: Any, budget: Budget) -> int:
    """Measure what the record does not have yet; return how much of it failed."""
    import torch

    from tests.gpu.machine import refusal
    from tests.gpu.works import works

    failed, refused = 0, False
    for name, work in works(given.device, full=given.full, tiny=given.tiny, record=record, budget=budget):
        if record.has(name) and "error" not in record.get(name):
            continue
        if budget.left <= 0:
            return failed + budget.stop(f"time is up before {name}; call again to go on")
        if refused:
            return failed + budget.stop("a refused capture may spoil what follows: call again to go on")
        # All ways multiply float32 in full precision, and cuDNN tries what is fastest.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
            try:
                entry = work()
            except Exception as error:  # a compiler's, too; the others can be measured all the same
                record.put(name, refusal(error))
                failed += say(f"{name}: FAILED: {type(error).__name__}: {error}", error=True)
                continue
        if entry is None:
            return failed + budget.stop(
                f"time is up during {name}; call again to go on, with more --seconds if need be"
            )
        record.put(name, entry)
        say(f"{name}: measured")
        refused = any(
            way.endswith(", CUDA graph") and "error" in values for way, values in entry.get("results", {}).items()
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
