"""The library of CUDA kernels: where it is, for which devices it was compiled, and why it cannot be used."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from bsfast.ops.library import why_not_built

VARIABLE = "BSFAST_CUDA_LIBRARY"


def load_cuda() -> str | None:
    """Load the CUDA kernels, which starts CUDA in this process.

    Returns:
        Why they cannot be used, or None if they can.
    """
    if why_not := why_no_device():
        return why_not
    named = os.environ.get(VARIABLE)
    path = Path(named).absolute() if named else Path(__file__).parent.parent / "lib" / "libbsfast_cuda.so"
    if not path.is_file():
        return f"{VARIABLE} must name a file, got {named}" if named else why_not_built("nvcc")
    try:
        compiled = architectures(path)
        if (why_not := _why_not_devices(compiled)) is None:
            torch.ops.load_library(path)
    except (OSError, AttributeError, ValueError) as error:
        return f"{path.name} cannot be loaded: {error}"
    return why_not


def why_no_device() -> str | None:
    """Say why no own kernel of whatever kind can run on CUDA, or None if one might."""
    if os.environ.get("BSFAST_NATIVE") == "0":
        return "switched off by BSFAST_NATIVE=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device, or no driver for it, is visible to torch"


def architectures(path: Path) -> list[tuple[int, int]]:
    """Read from a library for which compute capabilities it was compiled, rising; this registers its operators.

    Args:
        path: Of the library.

    Returns:
        Pairs of major and minor number.

    Raises:
        OSError: If it cannot be loaded.
        AttributeError: If it is another library.
    """  # noqa: DOC502 (raised by ctypes)
    function = ctypes.CDLL(str(path)).bsfast_cuda_architectures
    function.restype = ctypes.c_char_p
    numbers = [int(number) for number in function().decode().split(",")]
    return [(number // 100, number // 10 % 10) for number in numbers]


def _why_not_devices(compiled: Sequence[tuple[int, int]]) -> str | None:
    """Say which visible device has no code in a library for these capabilities."""
    for k in range(torch.cuda.device_count()):
        own = torch.cuda.get_device_capability(k)
        # Code runs on later devices of its generation; what was compiled for the last one, as PTX on any later.
        if not any(own[0] == major and own >= (major, minor) for major, minor in compiled) and own < compiled[-1]:
            names = ", ".join(f"sm_{major}{minor}" for major, minor in compiled)
            return (
                f"cuda:{k} ({torch.cuda.get_device_name(k)}) is sm_{own[0]}{own[1]}, and the kernels were compiled for "
                f"{names}; rebuild them there, or hide that device by CUDA_VISIBLE_DEVICES"
            )
    return None


@torch.compiler.assume_constant_result  # type: ignore[misc]  # torch does not annotate it
def gpu_generation() -> str:
    """Name the generation of the current GPU by its compute capability, as ``"sm_90"``."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
