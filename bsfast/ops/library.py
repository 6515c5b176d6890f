"""The operator namespace ``torch.ops.bsfast`` and the compiled libraries that implement it."""

import os
import sys
from pathlib import Path

import torch

LIBRARY = torch.library.Library("bsfast", "DEF")
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_WINOGRAD = "int winograd=0"
_PROLOGUE = "Tensor? scale=None, Tensor? shift=None, bool rectify=False"
LIBRARY.define(
    f"conv2d_out(Tensor x, Tensor weight, Tensor(a!) out, {_GEOMETRY}, *, {_WINOGRAD}, {_PROLOGUE}, "
    "Tensor? out_scale=None, Tensor? bias=None, Tensor? residual=None, bool relu=False, Tensor? mask=None, "
    "Tensor(b!)? mean=None, "
    "Tensor(c!)? variance=None) -> ()"
)
LIBRARY.define(
    f"conv2d_input_grad_out(Tensor grad, Tensor weight, Tensor(a!) out, {_GEOMETRY}, *, {_WINOGRAD}, "
    "Tensor? residual=None, Tensor? mask=None) -> ()"
)
LIBRARY.define(
    f"conv2d_weight_grad_out(Tensor x, Tensor grad, Tensor(a!) out, {_GEOMETRY}, *, {_WINOGRAD}, {_PROLOGUE}, "
    "bool patches=False) -> ()"
)
LIBRARY.define(f"conv2d_weight_grad_per_sample_out(Tensor x, Tensor grad, Tensor(a!) out, {_GEOMETRY}) -> ()")
LIBRARY.define(
    "batch_norm_out(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? y, Tensor(b!) mean, "
    "Tensor(c!) variance, Tensor(d!) scale, Tensor(e!) shift, Tensor(f!) inv, float eps, bool relu, bool known) -> ()"
)
LIBRARY.define(
    "batch_norm_grad_out(Tensor x, Tensor? y, Tensor grad, Tensor mean, Tensor scale, Tensor shift, Tensor inv, "
    "Tensor(a!) x_grad, Tensor(b!) weight_grad, Tensor(c!) bias_grad, Tensor(d!)? residual_grad, bool relu) -> ()"
)
LIBRARY.define(
    "sample_norm_out(Tensor x, Tensor? scale, Tensor? shift, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) inv, "
    "Tensor(d!) variance, int groups, float eps, float slope) -> ()"
)
LIBRARY.define(
    "sample_norm_grad_out(Tensor x, Tensor y, Tensor grad, Tensor? scale, Tensor mean, Tensor inv, Tensor(a!) x_grad, "
    "Tensor(b!) scale_grad, Tensor(c!) shift_grad, int groups, float slope) -> ()"
)
LIBRARY.define("transpose_out(Tensor x, Tensor(a!) out) -> ()")
LIBRARY.define("gram_out(Tensor x, Tensor? weights, Tensor(a!) out) -> ()")


def _load_cpu() -> str | None:
    """Load the CPU kernels; return why that is impossible, or None."""
    path = Path(__file__).parent.parent / "lib" / "libbsfast_cpu.so"
    if os.environ.get("BSFAST_NATIVE") == "0":
        return "switched off by BSFAST_NATIVE=0"
    if not path.exists():
        return why_not_built("a C++ compiler")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"cannot be loaded: {error}"
    return None


def why_not_built(compiler: str) -> str:
    """Say why a library is missing, and that this compiler would make it."""
    if sys.platform != "linux":
        return "not built: only Linux has native code"
    if (Path(__file__).parents[2] / "csrc").is_dir():
        return (
            f"not built: bsfast was imported from its source folder; with {compiler}, run "
            "`pip install --no-build-isolation -e .` there, or start Python in another folder to import an installed "
            "bsfast"
        )
    return f"not built; reinstall bsfast with {compiler} and without BSFAST_NATIVE=0"


CPU_WHY_NOT = _load_cpu()
