"""``python -m bsfast``, the lazy package and the installation without native code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bsfast
from bsfast.__main__ import describe

ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return done.stdout.strip()


def test_doctor_names_every_backend() -> None:
    text = describe()
    assert "backend native (cpu)" in text
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
    assert run(code, BSFAST_NATIVE="0") == "16 contiguous loop"


def test_import_is_lazy() -> None:
    assert run("import sys, bsfast; print('torch' in sys.modules)") == "False"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = bsfast.nonsense


def test_every_public_name_loads() -> None:
    for name in bsfast.__all__:
        assert getattr(bsfast, name) is not None
    assert set(bsfast.__all__) <= set(dir(bsfast))


def test_build_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PATH": str(tmp_path)}
    )
    assert done.returncode != 0
    assert "a C++17 compiler, cmake, ninja not found" in done.stderr
    assert "BSFAST_NATIVE=0" in done.stderr
