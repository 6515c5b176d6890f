"""Triton's kernels without a GPU: interpreted, as the operators that Python calls."""

import sys

import pytest

from tests.device.tools import ROOT, TOOLS, succeed

# File -> which of its tests. Those of CPU kernels, too, but for what takes minutes to interpret or is of other kernels,
# and in float64, of which the others have none.
CPU = "not float32 and not gradcheck and not instruction_set and not reasons"
TESTS = {
    "ops/test_batch_norm_triton.py": "",
    "ops/test_sample_norm_triton.py": "",
    "ops/test_memory_order_triton.py": "",
    "ops/test_batch_norm.py": f"{CPU} and not 128",
    "ops/test_sample_norm.py": f"{CPU} and not 130 and not (70 and contiguous)",
    "fuse/test_chains.py": "compute_what and not 17",
}


@pytest.mark.parametrize("tests", TESTS)
def test_operators_interpreted(monkeypatch, tests):
    if not (TOOLS / "triton").is_dir():
        pytest.skip("Triton not found; tests/device/requirements.txt names its package")
    monkeypatch.setenv("BSFAST_TRITON_INTERPRETED", "1")
    monkeypatch.setenv("BSFAST_NATIVE", "0")
    options = ["-p", "tests.device.as_triton", "-k", TESTS[tests], "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    succeed(sys.executable, "-m", "pytest", *options, ROOT / "tests" / tests)
