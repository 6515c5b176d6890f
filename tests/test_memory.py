"""Freed memory is kept: most large tensors of a process bring no new pages."""

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
print(done, sum(faults() > 1000 for _ in range(30)))
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")


def renewals(how: str) -> tuple[str, int]:
    """What was returned, and how many of 30 tensors, each freed before the next, were new memory."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    command = [sys.executable, "-c", CODE, how]
    done, renewed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return done, int(renewed)


@GLIBC
def test_keep_freed_memory():
    done, renewed = renewals("keep")
    assert done == "True"
    assert renewed <= 10  # alignment keeps some free blocks from being taken at once
    assert renewals("give back")[1] == 30


def test_keep_freed_memory_elsewhere(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert bsfast.keep_freed_memory() is False
