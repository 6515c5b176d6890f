"""The CUDA operators as Python calls them: on emulated blocks, and as a library that loads where there is no GPU."""

import sys

import pytest
import torch
from filelock import FileLock  # which torch needs, too

from tests.device.tools import ROOT, TOOLS, find, run, succeed

BUILD = ROOT / "build"
SETTINGS = [f"-DPython_EXECUTABLE={sys.executable}", "-DBSFAST_WERROR=ON"]


def build(folder: str, target: str, *settings: str) -> str:
    """Build a target without sanitizers, in one process at a time, and return the path of its library."""
    cmake, ninja = find("cmake"), find("ninja")
    tools = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *SETTINGS]
    with FileLock(f"{BUILD / folder}.lock"):
        succeed(cmake, "-S", ROOT, "-B", BUILD / folder, *tools, *settings)
        succeed(cmake, "--build", BUILD / folder, "--target", target)
    return str(BUILD / folder / f"lib{target}.so")


TESTS = [*(f"ops/test_conv{name}.py" for name in ("_cuda", "2d", "2d_derivatives", "2d_errors"))]
TESTS += ["fuse/test_precision.py"]


@pytest.fixture
def emulated(monkeypatch):
    find("c++")
    library = build("device-operators", "bsfast_emulated", "-DBSFAST_DEVICE_TESTS=ON")
    monkeypatch.setenv("BSFAST_EMULATED_LIBRARY", library)
    monkeypatch.setenv("BSFAST_NATIVE", "0")


def run_tests(tests: str, *options: str) -> None:
    options = ("-p", "tests.device.as_cuda", *options, "-W", "ignore::pytest.PytestAssertRewriteWarning")
    succeed(sys.executable, "-m", "pytest", *options, ROOT / "tests" / tests)


@pytest.mark.parametrize("tests", TESTS)
def test_operators_on_emulated_blocks(emulated, tests):
    run_tests(tests, "-k", "not opcheck")  # which is slow, and the same for every kernel


def test_sample_grad_on_emulated_blocks(emulated):
    run_tests("ops/test_conv2d_sample_grad.py", "-k", "equals_loop or half_precision or vmap")


def test_chains_on_emulated_blocks_and_interpreted(emulated, monkeypatch):
    if not (TOOLS / "triton").is_dir():
        pytest.skip("Triton not found; tests/device/requirements.txt names its package")
    monkeypatch.setenv("BSFAST_TRITON_INTERPRETED", "1")
    run_tests("fuse/test_chains_cuda.py", "-p", "tests.device.as_triton")


FAKE_STREAM = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'
LOAD = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
import torch
from filelock import FileLock  # which torch needs, too
import bsfast.ops
from bsfast.ops import cuda
print(cuda.architectures(sys.argv[2]))
torch.ops.load_library(sys.argv[2])
for name in ("conv2d_out", "conv2d_input_grad_out", "conv2d_weight_grad_out", "conv2d_weight_grad_per_sample_out"):
    print(torch._C._dispatch_has_kernel_for_dispatch_key(f"bsfast::{name}", "CUDA"))
"""


def test_library_loads_with_nothing_missing_but_the_stream(tmp_path):
    find("nvcc")
    library = build("device-library", "bsfast_cuda", "-DBSFAST_CUDA=ON", "-DBSFAST_CUDA_ARCHITECTURES=90")
    # A torch without CUDA has all but torch_cuda; a library of that name stands for it.
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA; `make gpu` loads the library for good")
    source, fake = tmp_path / "stream.cpp", tmp_path / "libtorch_cuda.so"
    source.write_text(FAKE_STREAM)
    succeed(find("c++"), "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", fake, source)
    done = run(sys.executable, "-c", LOAD, fake, library)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[(9, 0)]\nTrue\nTrue\nTrue\nTrue\n"
