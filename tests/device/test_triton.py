"""Triton's kernels without a GPU: interpreted, as the operators that Python calls."""

import sys

import pytest

from tests.device.test_operators import build
from tests.device.tools import ROOT, TOOLS, find, succeed

# File -> which of its tests. Those of CPU kernels, too, but for what takes minutes to interpret or is of other kernels,
# and in float64, of which the others have none.
CPU = "not float32 and not gradcheck and not instruction_set and not reasons"
TESTS = {
    "ops/test_batch_norm_triton.py": "",
    "ops/test_sample_norm_triton.py": "",
    "ops/test_memory_order_triton.py": "",
    "ops/test_gram_triton.py": "",
    "ops/test_batch_norm.py": f"{CPU} and not 128",
    "ops/test_sample_norm.py": f"{CPU} and not those_of_the_loop",
    "fuse/test_chains.py": "compute_what and not 17",
}


@pytest.fixture
def interpreted(monkeypatch):
    if not (TOOLS / "triton").is_dir():
        pytest.skip("Triton not found; tests/device/requirements.txt names its package")
    monkeypatch.setenv("BSFAST_TRITON_INTERPRETED", "1")
    monkeypatch.setenv("BSFAST_NATIVE", "0")


def run_tests(tests: str, *options: str) -> None:
    options = (*options, "-p", "tests.device.as_triton", "-W", "ignore::pytest.PytestAssertRewriteWarning")
    succeed(sys.executable, "-m", "pytest", *options, ROOT / "tests" / tests)


@pytest.mark.parametrize("tests", TESTS)
def test_operators_interpreted(interpreted, tests):
    run_tests(tests, "-k", TESTS[tests])


def test_networks_beside_emulated_convolutions(interpreted, monkeypatch):
    find("c++")
    library = build("device-operators", "bsfast_emulated", "-DBSFAST_DEVICE_TESTS=ON")
    monkeypatch.setenv("BSFAST_EMULATED_LIBRARY", library)
    run_tests("fuse/test_precision.py", "-p", "tests.device.as_cuda")
