"""Test files on a GPU: each in a process of its own, plain or under compute-sanitizer, until time is up."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
# What does not ask for CPU kernels by name; the direct calls of the CUDA kernels first.
TRITON = (
    *(f"ops/test_{name}_norm_triton.py" for name in ("batch", "sample")),
    *(f"ops/test_{name}_triton.py" for name in ("memory_order", "gram")),
)
TESTS = (
    *TRITON,
    *(
        f"ops/test_{name}.py"
        for name in (
            *("conv_cuda", "conv2d", "conv2d_derivatives", "conv2d_errors", "conv2d_sample_grad", "conv2d_compile"),
            "gram",
        )
    ),
    *(f"nn/test_{name}.py" for name in ("layers", "planes")),
    *(
        f"fuse/test_{name}.py"
        for name in ("equivalence", "axes", "precision", "chains_cuda", "cuda_graph", "cuda_graph_refuses")
    ),
    *(f"hessian/test_{name}.py" for name in ("blocks", "products")),
)
# What works on the CPU whatever the device: SciPy, and shuffling by torch.utils.data.
HOST_ONLY = "to_scipy or ragged_batches"
# The direct calls, in parts that compute-sanitizer ends in time, and the device of the truth.
SANITIZED = (
    *(
        ("ops/test_conv_cuda.py", "cpu", part)
        for part in ("float32", "bfloat16", "float16 and not bfloat16", "not (float32 or float16)")
    ),
    *((name, "cuda", "") for name in TRITON),
)
# cuBLAS is deterministic only with a workspace of its own, and operator tests want determinism.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class Budget:
    """Time for all that a call does.

    Attributes:
        cut_off: Whether work is left for another call.
    """

    def __init__(self, seconds: float) -> None:
        self.end, self.cut_off = time.monotonic() + seconds, False

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def stop(self, reason: str) -> int:
        """Say why work is left; return 0, for nothing failed."""
        self.cut_off = True
        return say(reason)


class Check(NamedTuple):
    """A command that pytest's exit status decides, and the entry of the record that says whether it passed."""

    entry: str
    command: list[str]
    environment: dict[str, str]


def run_tests(given: argparse.Namespace, record: Any, budget: Budget) -> int:
    """Run each test file on the device; return how many failed."""
    settings = [f"--device={given.device}", "-rs", "-k", f"not ({HOST_ONLY})"]
    checks = (Check(f"test {name}", [*pytest(name), *settings], {}) for name in given.tests)
    return run_checks(checks, record, budget, may_skip=given.device == "cpu")


def sanitize(given: argparse.Namespace, record: Any, budget: Budget) -> int:
    """Run the direct calls of the kernels under compute-sanitizer; return in how many parts a tool found something."""
    dry = given.device == "cpu"
    if not dry and shutil.which("compute-sanitizer") is None:
        return 1 + say("compute-sanitizer not found")
    checks = []
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
        # PyTorch asks CUDA what it may refuse, which is no error of a kernel.
        sanitizer += ["--report-api-errors=no"] if tool == "memcheck" else []
        for name, device, part in SANITIZED:
            settings = [f"--device={'cpu' if dry else device}", "-rs", *(["-k", part] if part else [])]
            command = [*([] if dry else sanitizer), *pytest(name), *settings]
            checks.append(
                Check(f"sanitize {tool} {name} {part}".strip(), command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            )
    return run_checks(checks, record, budget, may_skip=dry)


def pytest(name: str) -> list[str]:
    return [sys.executable, "-m", "pytest", str(ROOT / "tests" / name)]


def run_checks(checks: Iterable[Check], record: Any, budget: Budget, *, may_skip: bool) -> int:
    """Run what has not passed yet; return how many failed. One that skips all its tests fails, unless it may."""
    failed = 0
    for check in checks:
        if record.has(check.entry) and record.get(check.entry)["passed"]:
            continue
        if budget.left <= 0:
            return failed + budget.stop(f"time is up before {check.entry}; call again to go on")
        done = run(check.command, budget, **check.environment)
        if done is None:
            reason = f"time is up during {check.entry}; call again to go on, with more --seconds if need be"
            return failed + budget.stop(reason)
        text = done.stdout + done.stderr
        passed = done.returncode == 0 and (may_skip or re.search(r"\b\d+ passed\b", done.stdout) is not None)
        record.put(check.entry, {"passed": passed, "said": text.strip().splitlines()[-2:]})
        failed += not passed
        say(f"{check.entry}: {'passed' if passed else f'FAILED{chr(10)}{text[-6000:]}'}")
    return failed


def run(command: Sequence[str], budget: Budget, **environment: str) -> subprocess.CompletedProcess[str] | None:
    """Run a command; None if it takes longer than what is left of the time."""
    settings = {**os.environ, **ENVIRONMENT, **environment}
    try:
        return subprocess.run(
            command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=max(budget.left, 0.0)
        )
    except subprocess.TimeoutExpired:
        return None


def say(text: str, *, error: bool = False) -> int:
    """Print a line; return 1 if it is an error."""
    (sys.stderr if error else sys.stdout).write(text + "\n")
    return int(error)
