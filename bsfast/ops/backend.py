"""Which implementations this process can use, in order of preference, and why the others are out."""

from typing import NamedTuple

import torch

from bsfast.ops.library import CPU_WHY_NOT


class Backend(NamedTuple):
    """One implementation of the operators.

    Attributes:
        name: ``"native"`` (own kernels) or ``"aten"`` (stock PyTorch operators).
        device: Device type it serves, or ``"any"``.
        why_not: Why it cannot run in this process, or None if it can.
    """

    name: str
    device: str
    why_not: str | None


def _cuda_why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch built without CUDA"
    return "this version of bsfast has no CUDA kernels yet"


BACKENDS = (
    Backend("native", "cpu", CPU_WHY_NOT),
    Backend("native", "cuda", _cuda_why_not()),
    Backend("aten", "any", None),
)


def native_why_not(device: str) -> str | None:
    """Say why own kernels cannot run on a device type, or None if they can."""
    for backend in BACKENDS:
        if backend.name == "native" and backend.device == device:
            return backend.why_not
    return f"no own kernels for device type {device!r}"
