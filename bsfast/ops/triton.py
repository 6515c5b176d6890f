"""The Triton kernels as operators: registered when they are first asked for, or why they cannot be used."""

import torch
from torch.utils._python_dispatch import _disable_current_modes

from bsfast.ops.cuda import why_no_device
from bsfast.ops.library import LIBRARY

_LEAST_CAPABILITY = (7, 0)


def load_triton() -> str | None:
    """Register Triton's kernels as implementations for CUDA, which starts CUDA in this process.

    Returns:
        Why they cannot be used, or None if they can.
    """
    if why_not := why_no_device() or _why_not_devices():
        return why_not
    try:
        from bsfast.triton import OPERATORS, compile_one
    except Exception as error:  # Triton runs much code when it is imported
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "Triton is not installed: pip install triton" if missing else f"Triton cannot be imported: {error}"
    try:
        with _disable_current_modes():  # of fake tensors, under which a report may be the first to ask
            compile_one()
    except Exception as error:  # whatever it lacks: a C compiler, headers of Python, an architecture that it knows
        said = str(error).strip().splitlines() or [""]
        return f"Triton cannot compile a kernel: {type(error).__name__}: {said[0]}"
    for name, launch in OPERATORS.items():
        LIBRARY.impl(name, launch, "CUDA")
    return None


def _why_not_devices() -> str | None:
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        if (major, minor) < _LEAST_CAPABILITY:
            return (
                f"cuda:{k} ({torch.cuda.get_device_name(k)}) is sm_{major}{minor}, and Triton needs sm_70 or later; "
                "hide that device by CUDA_VISIBLE_DEVICES"
            )
    return None
