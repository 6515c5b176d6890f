"""The code that Triton's compiler makes of its kernels, ahead of time: nothing in local memory, wide loads."""

import itertools
import re
import sys
from pathlib import Path

import pytest

from tests.device.test_code_generation import read_log
from tests.device.tools import TOOLS, succeed

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
CASES = [*itertools.product(["float32", "float16", "bfloat16"], [70, 80, 90]), ("float64", 80)]
ACTIVATIONS = {"x", "y", "residual", "grad", "residual_grad", "x_grad"}
FLOAT64 = {"partial", "weighted", "mean", "inv", "variance"}  # of the normalisations of samples, whatever the dtype
MOST_REGISTERS = 128  # of which two programs of eight warps fit a multiprocessor

# For each kernel of tiles, what is compiled in: a value, or values of which each is tried.
BATCH = {"ROWS": 1, "COLUMNS": 2048}
BATCH_NORM = {
    "tile_moments": BATCH,
    "coefficients": {"BLOCK": 256, "EPS": 1e-5, "partial": [None, ...]},
    "normalise": BATCH | {"RELU": True},
    "tile_gradients": BATCH | {"RELU": True, "y": [None, ...]},
    "gradient_coefficients": {"BLOCK": 256},
    "input_gradient": BATCH | {"RELU": True, "y": [None, ...]},
}
MANY = {"CONTIGUOUS": False, "ROWS": 64, "LANES": 32}
LARGE = {"CONTIGUOUS": True, "ROWS": 2048, "LANES": 1}
SAMPLE = {"SLOPE": 0.2, "SCALE_PER_SAMPLE": True, "SHIFT_PER_SAMPLE": False}
SAMPLE_NORM = {
    "tile_moments": {},
    "group_moments": {"BLOCK": 8, "EPS": 1e-5},
    "normalise": SAMPLE,
    "tile_gradients": SAMPLE,
    "channel_gradients": SAMPLE | {"BLOCK": 8},
    "group_gradients": {"BLOCK": 8},
    "input_gradient": SAMPLE,
}


@pytest.fixture
def triton(monkeypatch, tmp_path):
    """Triton from the tools of these tests, with an empty cache."""
    if not (TOOLS / "triton").is_dir():
        pytest.skip("Triton not found; tests/device/requirements.txt names its package")
    monkeypatch.setattr(sys, "path", [*sys.path, str(TOOLS)])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # which Triton 3.9 warns of if it is not set
    return pytest.importorskip("triton")


def variants(function, settings):
    """Every combination of what is compiled in, as the kernel takes it."""
    own = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    own = {name: values for name, values in own.items() if name in function.arg_names}
    for values in itertools.product(*own.values()):
        yield {name: value for name, value in zip(own, values, strict=True) if value is not ...}


def compiled(function, dtype, architecture, compiled_in, pointers, num_warps=None):
    """Compile a kernel for aligned sizes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    own = "fp64" if dtype == "fp64" else "fp32"
    signature, attributes = {}, {}
    for k, name in enumerate(function.arg_names):
        kind = "i32" if name in SIZES else "*" + pointers.get(name, own)
        signature[name] = "constexpr" if name in compiled_in else kind
        if name not in compiled_in and (kind[0] == "*" or name in {"length", "rows", "lanes", "columns"}):
            attributes[k,] = [["tt.divisibility", 16]]
    elements = compiled_in.get("ROWS", 0) * compiled_in.get("COLUMNS", compiled_in.get("LANES", 0))
    source = ASTSource(function, signature, compiled_in, attributes)
    return compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": num_warps or (8 if elements else 1)})


SIZES = {"repeats", "channels", "length", "across", "tiles", "count", "rows", "lanes", "lane_tiles", "samples"}
SIZES |= {"group_channels", "columns"}


def check(kernel, name, tools, folder: Path, *, wide: bool) -> None:
    ptx = kernel.asm["ptx"]
    if wide:
        loads = re.findall(r"ld\.global\S*|cp\.async\.c[ag].*", ptx)
        assert any(".v4." in load or ".v2.b64" in load or "0x10, " in load for load in loads), (name, loads)
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    version, architecture = (re.search(rf"\.{word} ([\w.]+)", ptx)[1] for word in ("version", "target"))
    ptxas = tools / ("ptxas" if float(version) < 9 else "ptxas-blackwell")  # of CUDA 12, which knows sm_70, and of 13
    (code,) = read_log(succeed(ptxas, "-v", f"--gpu-name={architecture}", "-o", "/dev/null", file)).values()
    assert code.local_bytes == [0, 0, 0], name
    assert code.registers <= MOST_REGISTERS, name


@pytest.mark.parametrize(("dtype", "architecture"), CASES)
def test_triton_kernels_compile(triton, dtype, architecture, tmp_path):
    import triton.language as tl

    from bsfast.triton import batch_norm_kernels, gram, layout, sample_norm_kernels

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    kind = DTYPES[dtype]
    acc = {"ACC": tl.float64 if kind == "fp64" else tl.float32}
    activations = dict.fromkeys(ACTIVATIONS, kind)
    for name, settings in BATCH_NORM.items():
        function = getattr(batch_norm_kernels, name)
        sums = {"partial": "fp64" if name in {"tile_moments", "coefficients"} or kind == "fp64" else "fp32"}
        for compiled_in in variants(function, settings | acc):
            kernel = compiled(function, kind, architecture, compiled_in, activations | sums)
            check(kernel, (name, compiled_in), tools, tmp_path, wide="ROWS" in compiled_in)
    kernel = compiled(layout.transpose, kind, architecture, {"SIDE": 32}, {"x": kind, "out": kind})
    check(kernel, "transpose", tools, tmp_path, wide=True)
    assert kernel.metadata.shared > 0  # between reading rows and writing columns
    if kind == "fp32":
        for compiled_in in variants(gram.gram, {"SIDE": gram.SIDE, "DEPTH": gram.DEPTH, "weights": [None, ...]}):
            kernel = compiled(gram.gram, kind, architecture, compiled_in, {}, num_warps=gram.WARPS)
            check(kernel, ("gram", compiled_in), tools, tmp_path, wide=True)
            assert "mma" not in kernel.asm["ptx"]  # which would be of TF32
    for name, settings in SAMPLE_NORM.items():
        function = getattr(sample_norm_kernels, name)
        kinds = activations | dict.fromkeys(FLOAT64, "fp64")
        if name in {"tile_gradients", "channel_gradients"} and kind != "fp64":
            kinds["partial"] = "fp32"
        for memory in (MANY, LARGE):
            for compiled_in in variants(function, memory | settings | acc):
                kernel = compiled(function, kind, architecture, compiled_in, kinds)
                check(kernel, (name, compiled_in), tools, tmp_path, wide="ROWS" in compiled_in)
