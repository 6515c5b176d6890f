"""Tests and measurements on a machine with a GPU: ``python -m tests.gpu test sanitize bench``.

``make gpu`` and the targets beside it call this, with what their Python has. Nothing is fetched. The CUDA operators are
those that ``BSFAST_CUDA_LIBRARY`` names, or are built for this GPU. What has passed or is measured already, with the
same sources on the same device, is not done again, and nothing begins after ``--seconds``: call it again to go on.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "gpu"
RECORDS = ROOT / "tests" / "benchmarks" / "records"
# What does not ask for CPU kernels by name; the direct calls of the CUDA kernels first.
TESTS = (
    *(f"ops/test_{name}_norm_triton.py" for name in ("batch", "sample")),
    *(f"ops/test_{name}_triton.py" for name in ("memory_order", "gram")),
    *(
        f"ops/test_conv{name}.py"
        for name in ("_cuda", "2d", "2d_derivatives", "2d_errors", "2d_sample_grad", "2d_compile")
    ),
    *(f"nn/test_{name}.py" for name in ("layers", "planes")),
    *(
        f"fuse/test_{name}.py"
        for name in ("equivalence", "axes", "precision", "chains_cuda", "cuda_graph", "cuda_graph_refuses")
    ),
)
SANITIZED = "float32 or bfloat16"  # of the direct calls
# cuBLAS is deterministic only with a workspace of its own, and operator tests want determinism.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class Budget:
    """Time for all that a call does."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the works that the command line names, and return the exit status."""
    given = parse(arguments)
    if importlib.util.find_spec("torch") is None:
        return say(f"tests.gpu: needs torch, got {sys.executable} without it; try make PYTHON=...", error=True)
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
    return 1 if failed else 0


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
    """Build the CUDA operators for this GPU unless a library is named; say why they cannot be used."""
    if named := os.environ.get("BSFAST_CUDA_LIBRARY"):
        os.environ["BSFAST_CUDA_LIBRARY"] = str(Path(named).absolute())  # works run in other folders
    else:
        tools = [tool for tool in ("cmake", "ninja", "nvcc", "c++") if shutil.which(tool) is None]
        if tools:
            return f"{', '.join(tools)} not found; BSFAST_CUDA_LIBRARY may name a library built elsewhere"
        settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DBSFAST_CUDA=ON", "-DBSFAST_CUDA_ARCHITECTURES=native"]
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *settings],
            ["cmake", "--build", str(BUILD), "--target", "bsfast_cuda"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{' '.join(command[:2])} must succeed, got\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        os.environ["BSFAST_CUDA_LIBRARY"] = str(BUILD / "libbsfast_cuda.so")
    from bsfast.ops.backend import native_why_not

    return native_why_not("cuda")


def digest(device: str) -> str:
    """Digest of the sources and, on a GPU, of the library."""
    paths = [path for folder in ("bsfast", "csrc", "tests") for path in (ROOT / folder).rglob("*")]
    paths = sorted(path for path in paths if path.suffix in {".py", ".h", ".cuh", ".cu", ".cpp"})
    paths += [Path(os.environ["BSFAST_CUDA_LIBRARY"])] if device == "cuda" else []
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def run_tests(given: argparse.Namespace, record: Any, budget: Budget) -> int:
    """Run each test file in a process of its own, on the device; return how many failed."""
    failed = 0
    for name in given.tests:
        entry = f"test {name}"
        if record.has(entry) and record.get(entry)["passed"]:
            continue
        if budget.left <= 0:
            return failed + say(f"time is up before {name}; call again to go on")
        command = [sys.executable, "-m", "pytest", f"--device={given.device}", "-rs", str(ROOT / "tests" / name)]
        passed, text = run(command, budget)
        record.put(entry, {"passed": passed, "said": text.strip().splitlines()[-1:]})
        failed += not passed
        say(f"{entry}: {'passed' if passed else f'FAILED{chr(10)}{text[-6000:]}'}")
    return failed


def sanitize(given: argparse.Namespace, record: Any, budget: Budget) -> int:
    """Run the direct calls of the kernels under compute-sanitizer; return how many of its tools found something."""
    if given.device == "cuda" and shutil.which("compute-sanitizer") is None:
        return 1 + say("compute-sanitizer not found", error=False)
    failed = 0
    for tool in ("memcheck", "racecheck"):
        entry = f"sanitize {tool}"
        if record.has(entry) and record.get(entry)["passed"]:
            continue
        if budget.left <= 0:
            return failed + say(f"time is up before {tool}; call again to go on")
        checked = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
        tests = [sys.executable, "-m", "pytest", str(ROOT / "tests/ops/test_conv_cuda.py"), "-k", SANITIZED]
        command = [*(checked if given.device == "cuda" else []), *tests]
        passed, text = run(command, budget, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        record.put(entry, {"passed": passed, "said": text.strip().splitlines()[-2:]})
        failed += not passed
        say(f"{entry}: {'passed' if passed else f'FAILED{chr(10)}{text[-6000:]}'}")
    return failed


def run(command: Sequence[str], budget: Budget, **environment: str) -> tuple[bool, str]:
    """Run a command within what is left of the time, and return whether it succeeded and what it said."""
    settings = {**os.environ, **ENVIRONMENT, **environment}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=budget.left
        )
    except subprocess.TimeoutExpired:
        return False, "time is up; call again to go on"
    return done.returncode == 0, done.stdout + done.stderr


def bench(given: argparse.Namespace, record: Any, budget: Budget) -> int:
    """Measure what the record does not have yet; return how much of it failed."""
    import torch

    from tests.gpu.works import works

    failed = 0
    for name, work in works(given.device, full=given.full, tiny=given.tiny, record=record):
        if record.has(name):
            continue
        if budget.left <= 0:
            return failed + say(f"time is up before {name}; call again to go on")
        # All ways multiply float32 in full precision, and cuDNN tries what is fastest.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
            try:
                record.put(name, work())
            except (RuntimeError, ValueError) as error:  # the others can be measured all the same
                failed += say(f"{name}: FAILED: {error}", error=True)
                continue
        say(f"{name}: measured")
    return failed


def say(text: str, *, error: bool = False) -> int:
    """Print a line; return 1 if it is an error."""
    (sys.stderr if error else sys.stdout).write(text + "\n")
    return int(error)


if __name__ == "__main__":
    sys.exit(main())
