"""``python -m bsfast``, the lazy package and the installation without native code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bsfast
from bsfast.__main__ import describe

ROOT = Path(__file__).parent.parent


def run(code: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd, env=os.environ | environment
    )
    return done.stdout.strip()


def test_doctor_names_every_backend() -> None:
    text = describe()
    assert "backend native (cpu)" in text
    assert "backend native (cuda)" in text
    assert "backend triton (cuda)" in text
    assert "backend aten (any)" in text
    assert bsfast.__version__ in text


def test_doctor_says_why_native_is_off() -> None:
    code = "import bsfast.__main__ as m; print(m.describe())"
    assert "not used: switched off by BSFAST_NATIVE=0" in run(code, BSFAST_NATIVE="0")


def test_without_native_code_fuse_runs_on_stock_operators() -> None:
    code = """
import torch, bsfast
net = bsfast.fuse(lambda: torch.nn.Conv2d(3, 4, 3), num_branches=2)
x = torch.randn(16, 3, 5, 5)
print(net(x).shape[0], *(row.kernel for row in net.report().rows))
"""
    assert run(code, BSFAST_NATIVE="0") == "16 contiguous grouped"


def test_import_is_lazy() -> None:
    assert run("import sys, bsfast; print('torch' in sys.modules)") == "False"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = bsfast.nonsense


def test_every_public_name_loads() -> None:
    for name in bsfast.__all__:
        assert getattr(bsfast, name) is not None
    assert set(bsfast.__all__) <= set(dir(bsfast))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Copy of the sources without built libraries, as in a fresh clone."""
    shutil.copytree(ROOT / "bsfast", tmp_path / "bsfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    return tmp_path


def test_doctor_in_a_source_tree_says_to_install_it(clone: Path) -> None:
    code = "import bsfast.__main__ as m; print(m.describe())"
    text = run(code, clone, BSFAST_NATIVE="1")
    assert f"{bsfast.__version__}, imported from {clone / 'bsfast'}" in text
    assert "not used: not built: bsfast was imported from its source folder; with a C++ compiler, run " in text
    assert "pip install --no-build-isolation -e ." in text
    assert "start Python in another folder" in text
    (clone / "csrc").rmdir()  # now like an installed package
    assert "not built; reinstall bsfast with a C++ compiler" in run(code, clone, BSFAST_NATIVE="1")


def test_doctor_on_another_system_says_that_only_linux_has_native_code(clone: Path) -> None:
    code = "import sys; from bsfast.ops import library; sys.platform = 'darwin'; print(library.why_not_built('c++'))"
    assert run(code, clone, BSFAST_NATIVE="1") == "not built: only Linux has native code"


def test_import_from_a_clone_that_is_not_installed_says_to_install_it(clone: Path) -> None:
    command = [sys.executable, "-E", "-S", "-c", "import bsfast"]  # -S: no installed packages
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=clone)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: bsfast is not installed; in the folder of its source, run `pip install ")
    assert "PackageNotFoundError" not in done.stderr
