"""Freed memory is kept: the second large tensor of a process brings no new pages."""

import os
import platform
import subprocess
import sys

import pytest

import bsfast

CODE = """
import resource, sys, torch, bsfast
done = bsfast.keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 1024 * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(done, min(faults() for _ in range(3)))
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")


def new_pages(how: str) -> tuple[str, int]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    command = [sys.executable, "-c", CODE, how]
    done, faults = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return done, int(faults)


@GLIBC
def test_keep_freed_memory():
    assert new_pages("keep") == ("True", 0)
    assert new_pages("give back")[1] > 0


def test_keep_freed_memory_elsewhere(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert bsfast.keep_freed_memory() is False
