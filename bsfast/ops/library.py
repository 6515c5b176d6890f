"""The operator namespace ``torch.ops.bsfast`` and the compiled libraries that implement it."""

import os
from pathlib import Path

import torch

LIBRARY = torch.library.Library("bsfast", "DEF")
LIBRARY.define("conv3x3(Tensor x, Tensor weight, Tensor(a!) out, int pad_height, int pad_width) -> ()")


def _load_cpu() -> str | None:
    """Load the CPU kernels; return why that is impossible, or None."""
    path = Path(__file__).parent.parent / "lib" / "libbsfast_cpu.so"
    if os.environ.get("BSFAST_NATIVE") == "0":
        return "switched off by BSFAST_NATIVE=0"
    if not path.exists():
        return "not built; reinstall bsfast with a C++ compiler and without BSFAST_NATIVE=0"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"cannot be loaded: {error}"
    return None


CPU_WHY_NOT = _load_cpu()
