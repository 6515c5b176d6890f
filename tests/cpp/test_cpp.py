"""The C++ tests: built by their CMake targets with the address and undefined-behaviour sanitizers, then run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "cpp-tests"
SETTINGS = ["-DCMAKE_BUILD_TYPE=Release", "-DBSFAST_WERROR=ON", "-DBSFAST_SANITIZE=address,undefined"]


def find(tool: str) -> str:
    """Find a tool beside this Python or on the path; skip the test without it."""
    path = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} not found")
    return path


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["conv_test", "winograd_test"])
def test_cpp(target):
    find("c++")
    cmake, ninja = find("cmake"), find("ninja")
    tools = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    run(cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", *tools, *SETTINGS)
    run(cmake, "--build", BUILD, "--target", target)
    run(BUILD / target)
