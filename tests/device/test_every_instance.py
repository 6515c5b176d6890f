"""Every kernel that the plan may start, for every architecture: no spilled registers, no more than its like may take.

``make codegen-full`` runs this; the instances of ``make test-device`` stand for all in everyday work.
"""

import re
from pathlib import Path

import pytest

from tests.device.instances import INSTANCES
from tests.device.nvrtc import compile_cubin
from tests.device.test_code_generation import Code, nvcc, read_log
from tests.device.tools import ROOT, TOOLS, find, succeed

# Whose bounds in instances.py an architecture has.
LIKE = {
    "sm_70": "sm_70",
    "sm_75": "sm_80",
    "sm_80": "sm_80",
    "sm_86": "sm_80",
    "sm_89": "sm_80",
    "sm_90": "sm_90",
    "sm_100": "sm_90",
    "sm_120": "sm_90",
}
MOST = 255  # that an instruction can name
FEWER_BLOCKS = {("sm_120", "conv_weight_grad")}  # with as many as elsewhere its compiler spills
PLAN = Path(__file__).with_name("plan.cu")


@pytest.fixture(scope="module")
def symbols(tmp_path_factory):
    """Signatures of all kernels of the plan, as a compiler for all of them names them."""
    _, log = nvcc(PLAN.read_text(), "sm_80", tmp_path_factory.mktemp("plan"))
    return succeed(find("c++filt"), *re.findall(r"Compiling entry function '(\w+)'", log)).splitlines()


def by_nvrtc(symbols: list[str], architecture: str) -> dict[str, Code]:
    library = next(TOOLS.rglob("libnvrtc.so.12"), None)
    if library is None:
        pytest.skip("libnvrtc.so.12 not found; tests/device/requirements.txt names its package")
    headers = sorted(path.name for path in ROOT.glob("csrc/cuda/*.cuh"))
    # Templates only: kernels that are none are compiled by being included.
    kernels = [f"template __global__ {symbol};" for symbol in symbols if symbol.startswith("void ")]
    text = "\n".join([*(f'#include "cuda/{header}"' for header in headers), *kernels])
    options = [f"--gpu-architecture={architecture}", "--std=c++17", f"-I{ROOT / 'csrc'}", "--ptxas-options=-v"]
    return read_log(compile_cubin(library, text, options)[-1])


def bounds(family: str, architecture: str) -> list[int]:
    """Most registers of the listed instances of a kernel; none where the architecture lacks what it needs."""
    alike = [instance.registers for instance in INSTANCES if instance.name.split("<")[0] == family]
    assert alike, f"{family} must be in instances.py"
    return [registers[LIKE[architecture]] for registers in alike if LIKE[architecture] in registers]


@pytest.mark.parametrize("architecture", LIKE)
def test_every_instance(symbols, tmp_path, architecture):
    started = [symbol for symbol in symbols if bounds(re.search(r"bsfast::(\w+)", symbol)[1], architecture)]
    if architecture == "sm_70":  # nvcc 13 has dropped it
        kernels = by_nvrtc(started, architecture)
    else:
        kernels = read_log(nvcc(PLAN.read_text(), architecture, tmp_path)[1])
    assert len(kernels) == len(started if architecture == "sm_70" else symbols)
    for name, code in kernels.items():
        family = name.split("<")[0]
        if most := bounds(family, architecture):
            assert code.local_bytes == [0, 0, 0], name
            assert code.registers <= (MOST if (architecture, family) in FEWER_BLOCKS else max(most)), name
