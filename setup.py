"""Shim that lets setuptools run CMake; every source file and flag is in CMakeLists.txt.

``BSFAST_NATIVE=0``, or a system other than Linux, gives the pure Python package, which runs on stock torch operators.
``BSFAST_WERROR=1`` makes warnings of the C++ compiler errors. ``BSFAST_CUDA=ON`` builds the CUDA operators although
this torch has no CUDA, ``OFF`` leaves them out; ``BSFAST_CUDA_ARCHITECTURES`` says for what, such as ``80-real;90``.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configure, build and install the native code into the package folder."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "bsfast"
        cmake, ninja = require_tools()
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={package}"]
        configure += [f"-DBSFAST_WERROR={os.environ.get('BSFAST_WERROR', 'OFF')}"]
        for name in ("BSFAST_CUDA", "BSFAST_CUDA_ARCHITECTURES"):
            configure += [f"-D{name}={os.environ[name]}"] if name in os.environ else []
        for step in (configure, [cmake, "--build", build], [cmake, "--install", build]):
            subprocess.run([str(part) for part in step], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def require_tools() -> tuple[str, str]:
    """Find CMake and Ninja, and check for a compiler and Python's headers, or say what to install."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    found = {"a C++17 compiler": compiler, "Python.h": headers}
    found |= {tool: shutil.which(tool) for tool in ("cmake", "ninja")}
    missing = [name for name, path in found.items() if not path]
    if missing:
        raise SystemExit(
            f"bsfast: cannot build the native code: {', '.join(missing)} not found. Install it (Debian, Ubuntu: "
            "apt-get install g++ python3-dev; Fedora: dnf install gcc-c++ python3-devel; any system: "
            "pip install cmake ninja), or set BSFAST_NATIVE=0 to install bsfast "
            "without native code, on stock torch operators."
        )
    return str(found["cmake"]), str(found["ninja"])


native = os.environ.get("BSFAST_NATIVE") != "0" and sys.platform == "linux"
setup(
    ext_modules=[Extension("bsfast._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
