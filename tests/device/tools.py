"""Where the tools are that these tests run; a test skips, and says so, without one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOOLS = ROOT / "build" / "device-tools"  # what requirements.txt installs


def find(tool: str) -> str:
    """Find a program beside this Python, on the path or among the installed tools."""
    installed = next(TOOLS.rglob(f"bin/{tool}"), None)
    path = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool) or installed
    if path is None:
        pytest.skip(f"{tool} not found")
    return str(path)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def succeed(*command: str | Path) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
