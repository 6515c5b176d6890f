"""Triton's kernels without a GPU: interpreted, as the operators that Python calls."""

import sys

import pytest

from tests.device.tools import ROOT, TOOLS, succeed

# Those of float32 and float64 on CPU kernels, too, but for what is slow to interpret or about other kernels.
TESTS = [f"ops/test_{kind}_norm{name}.py" for kind in ("batch", "sample") for name in ("_triton", "")]
TESTS += ["ops/test_memory_order_triton.py", "fuse/test_equivalence.py"]
LEFT_OUT = ["gradcheck", "instruction_set", "reasons", "128", "130", "70 and contiguous"]


@pytest.fixture
def interpreted(monkeypatch):
    if not (TOOLS / "triton").is_dir():
        pytest.skip("Triton not found; tests/device/requirements.txt names its package")
    monkeypatch.setenv("BSFAST_TRITON_INTERPRETED", "1")
    monkeypatch.setenv("BSFAST_NATIVE", "0")


@pytest.mark.parametrize("tests", TESTS)
def test_operators_interpreted(interpreted, tests):
    left_out = " and ".join(f"not {name}" for name in LEFT_OUT)
    options = ["-p", "tests.device.as_triton", "-k", left_out, "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    succeed(sys.executable, "-m", "pytest", *options, ROOT / "tests" / tests)
