"""Which implementations this process can use, in order of preference, and why the others are out."""

from collections.abc import Callable
from threading import RLock
from typing import NamedTuple

import torch

from bsfast.ops.cuda import load_cuda
from bsfast.ops.library import CPU_WHY_NOT
from bsfast.ops.triton import load_triton


class Backend(NamedTuple):
    """One implementation of the operators.

    Attributes:
        name: ``"native"`` (own kernels in C++ and CUDA), ``"triton"`` (own kernels in Triton) or ``"aten"`` (stock
            PyTorch operators).
        device: Device type it serves, or ``"any"``.
        why_not: Why it cannot run in this process, or None if it can.
    """

    name: str
    device: str
    why_not: str | None


class Kernels(NamedTuple):
    """What the own kernels of a device type can do.

    Attributes:
        dtypes: Of the operands.
        operators: By name: ``"conv2d"`` with its gradients, ``"winograd"`` (both by tiles), ``"sample_grad"`` (the
            weight gradient of every sample), ``"norm"``, ``"norm_conv2d"`` (joined with a convolution), ``"layout"``
            (conversions of the memory order), ``"gram"`` (products of all rows of a matrix,
            float32 only).
    """

    dtypes: tuple[torch.dtype, ...]
    operators: frozenset[str]


_ALL = frozenset({"conv2d", "winograd", "sample_grad", "norm", "norm_conv2d"})
_CUDA = frozenset({"conv2d", "sample_grad", "norm_conv2d"})
_KERNELS = {
    "cpu": Kernels((torch.float32, torch.float64), _ALL),
    "cuda": Kernels((torch.float32, torch.float16, torch.bfloat16), _CUDA),
}
_TRITON = Kernels((torch.float32, torch.float64, torch.float16, torch.bfloat16), frozenset({"norm", "layout", "gram"}))
# By device type, and of Triton. Those of CUDA are found when they are first asked for: finding them starts CUDA in this
# process, and a forked one, as of a data loader, could then not use it.
_why_not = {"cpu": CPU_WHY_NOT}
_FINDING = RLock()


@torch.compiler.assume_constant_result  # type: ignore[misc]  # torch does not annotate it
def native_why_not(device: str) -> str | None:
    """Say why own kernels cannot run on a device type, or None if they can."""
    if device == "cuda":
        _find(device, load_cuda)
    return _why_not.get(device, f"no own kernels for device type {device!r}")


@torch.compiler.assume_constant_result  # type: ignore[misc]  # torch does not annotate it
def triton_why_not() -> str | None:
    """Say why Triton's kernels cannot run on CUDA, or None if they can."""
    _find("triton", load_triton)
    return _why_not["triton"]


def _find(name: str, load: Callable[[], str | None]) -> None:
    """Load what was not asked for before, in one of the threads that ask."""
    if name not in _why_not:
        with _FINDING:
            if name not in _why_not:
                _why_not[name] = load()


def kernel_why_not(operator: str, device: str, dtype: torch.dtype) -> str | None:
    """Say why an operator of :class:`Kernels` has no own kernel for a device type and dtype, or None if it has."""
    by_triton = device == "cuda" and operator in _TRITON.operators
    if why_not := triton_why_not() if by_triton else native_why_not(device):
        return why_not
    kernels = _TRITON if by_triton else _KERNELS[device]
    if dtype not in kernels.dtypes:
        return f"{dtype} has no own kernel"
    return None if operator in kernels.operators else f"no own {device} kernel does this"


def backends() -> tuple[Backend, ...]:
    """Return all implementations; the first that can run an operator does."""
    own = (Backend("native", device, native_why_not(device)) for device in _KERNELS)
    return (*own, Backend("triton", "cuda", triton_why_not()), Backend("aten", "any", None))
