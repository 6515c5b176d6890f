"""``python -m bsfast``: versions, devices, backends, and the reason for each refusal."""

import platform
import sys
from pathlib import Path

import torch

import bsfast
from bsfast.ops.backend import backends


def describe() -> str:
    """Describe this installation, a line a fact.

    Returns:
        Text to paste into a bug report.
    """
    lines = [
        ("bsfast", f"{bsfast.__version__}, imported from {Path(bsfast.__file__).parent}"),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("system", f"{platform.system()} {platform.machine()}"),
        ("instruction set", _instruction_set()),
        *((f"device cuda:{k}", _cuda_device(k)) for k in range(torch.cuda.device_count())),
    ]
    for backend in backends():
        state = "ready" if backend.why_not is None else f"not used: {backend.why_not}"
        lines.append((f"backend {backend.name} ({backend.device})", state))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)


def _cuda_device(k: int) -> str:
    major, minor = torch.cuda.get_device_capability(k)
    return f"{torch.cuda.get_device_name(k)}, sm_{major}{minor}"


def _instruction_set() -> str:
    try:
        from bsfast._native import instruction_set
    except ImportError as error:
        return f"unknown: {error}"
    return str(instruction_set())


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
