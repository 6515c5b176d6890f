"""What setup.py and the Makefile build and package, and what they say when something is missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | environment, timeout=100
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Copy of what a package is made of, with libraries that an earlier build has left."""
    clone = tmp_path / "clone"
    for folder in ("bsfast", "csrc", "tests"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=LEFT_OUT)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, clone)
    (clone / "bsfast" / "lib").mkdir(exist_ok=True)
    for library in ("lib/libbsfast_cpu.so", "_native.cpython-310-x86_64-linux-gnu.so"):
        (clone / "bsfast" / library).write_text("stale")
    listed = clone / "bsfast.egg-info" / "SOURCES.txt"  # setuptools takes in what this says
    listed.parent.mkdir()
    listed.write_text("bsfast/lib/libbsfast_cpu.so\n")
    return clone


@pytest.mark.parametrize(
    ("platform", "native", "built"),
    [("linux", "1", True), ("linux", "0", False), ("darwin", "1", False), ("win32", "1", False)],
)
def test_only_linux_builds_native_code(platform, native, built):
    code = f"""
import runpy, sys, setuptools.command.build_ext
setuptools.setup = lambda **settings: print(len(settings["ext_modules"]))
sys.platform = {platform!r}
runpy.run_path("setup.py")
"""
    done = run(sys.executable, "-c", code, BSFAST_NATIVE=native)
    assert (done.stdout, done.stderr) == (f"{built:d}\n", "")


def test_wheel_without_native_code_has_no_library(clone):
    done = run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "out", cwd=clone, BSFAST_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (clone / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"bsfast/__init__.py", "bsfast/py.typed", "bsfast/ops/library.py"} <= {*names}
    assert not [name for name in names if name.endswith(".so")]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bsfast"}


def test_source_distribution_has_all_that_a_build_needs(clone):
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", "out", cwd=clone)
    assert done.returncode == 0, done.stderr
    (archive,) = (clone / "out").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("bsfast", "csrc", "tests/cpp"):
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES}
        wanted = sources if folder != "tests/cpp" else {name for name in sources if name.endswith(".cpp")}
        assert wanted, folder
        assert wanted <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "bsfast/py.typed"} <= names
    assert not [name for name in names if name.endswith(".so")]


SUFFIXES = {".py", ".cpp", ".h"}


def test_build_without_tools_says_what_to_install(tmp_path):
    code = f"""
import runpy, sys, sysconfig
sysconfig.get_path = lambda name: {str(tmp_path)!r}
sys.argv = ["setup.py", "build_ext", "--build-lib", {str(tmp_path)!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = run(sys.executable, "-c", code, PATH=str(tmp_path), BSFAST_NATIVE="1")
    assert done.returncode != 0
    assert "a C++17 compiler, Python.h, cmake, ninja not found" in done.stderr
    assert "apt-get install g++ python3-dev" in done.stderr
    assert "dnf install gcc-c++ python3-devel" in done.stderr
    assert "BSFAST_NATIVE=0" in done.stderr


@pytest.mark.parametrize(("setting", "passed"), [({}, "OFF"), ({"BSFAST_WERROR": "1"}, "1")])
def test_warnings_are_errors_only_when_asked_for(tmp_path, monkeypatch, setting, passed):
    monkeypatch.delenv("BSFAST_WERROR", raising=False)
    for tool in ("c++", "cmake", "ninja"):
        (tmp_path / tool).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / tool).chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path]
    done = run(*command, PATH=f"{tmp_path}:{os.environ['PATH']}", BSFAST_NATIVE="1", **setting)
    assert done.returncode == 0, done.stderr
    assert f"-DBSFAST_WERROR={passed}" in done.stdout.splitlines()[0].split()


@pytest.mark.parametrize(
    ("pretend", "message"),
    [
        ("sys.version_info = (3, 9, 1)", "is not Python 3.10 to 3.13"),
        ("sys.version_info = (3, 14, 0)", "make PYTHON=python3.12"),
        ("sys.modules['ensurepip'] = None", "apt-get install python3-venv"),
    ],
)
def test_make_setup_says_which_python_it_needs(tmp_path, pretend, message):
    make = shutil.which("make")
    if make is None:
        pytest.skip("make not found")
    python = tmp_path / "python3"
    python.write_text(f"""#!/bin/sh
exec {sys.executable} -c "import sys; {pretend}; exec(sys.argv[2])" "$@"
""")
    python.chmod(0o755)
    done = run(make, "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "venv").exists()
