"""The CUDA kernels on the CPU: built with the address and undefined-behaviour sanitizers, then run."""

import sys

import pytest

from tests.device.tools import ROOT, find, run, succeed

BUILD = ROOT / "build" / "device-tests"
SETTINGS = ["-DBSFAST_WERROR=ON", "-DBSFAST_SANITIZE=address,undefined", "-DBSFAST_DEVICE_TESTS=ON"]
KERNELS = [
    "conv_gather_test",
    "conv_gather_matrix_test",
    "conv_weight_grad_test",
    "conv_weight_grad_matrix_test",
    "conv_sample_grad_test",
    "conv_around_test",
]
TESTS = ["emulation_test", "ucontext_test", *KERNELS]


@pytest.fixture(scope="module")
def build():
    find("c++")
    cmake, ninja = find("cmake"), find("ninja")
    tools = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    succeed(cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", *tools, *SETTINGS)
    succeed(cmake, "--build", BUILD, "--target", *TESTS)
    return BUILD


@pytest.mark.parametrize("test", TESTS)
def test_emulated(build, test):
    succeed(build / test)


@pytest.mark.parametrize("memory", ["shared", "global"])
def test_emulation_finds_access_out_of_bounds(build, memory):
    done = run(build / "emulation_test", memory)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
