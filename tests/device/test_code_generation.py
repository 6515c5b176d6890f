"""The code that CUDA's compilers make of the kernels: no spilled registers, no more registers than planned."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.device.instances import INSTANCES, source
from tests.device.nvrtc import compile_cubin
from tests.device.tools import ROOT, TOOLS, find, succeed

MOST_INSTANCES = 30
ARCHITECTURES = ["sm_70", "sm_80", "sm_90"]
# Instructions as nvdisasm names them, in PTX: nvdisasm 13 does not read sm_70.
PTX = {
    "FFMA": "fma.rn.f32",
    "SHFL.BFLY": "shfl.sync.bfly.b32",
    "HMMA.884.F32.F32.STEP0": "mma.sync.aligned.m8n8k4.col.col.f32.f16.f16.f32",
}


class Code(NamedTuple):
    """What the compiler says of one kernel."""

    local_bytes: list[int]  # stack frame, spill stores, spill loads
    registers: int


def plain_names(symbols: list[str]) -> list[str]:
    """Return the names of kernels as instances.py writes them."""
    lines = succeed(find("c++filt"), *symbols).splitlines()
    return [re.sub(r"^void |bsfast::| |\(.*", "", line) for line in lines]


def read_log(log: str) -> dict[str, Code]:
    """Read the report of ``ptxas -v``."""
    found = []
    parts = log.split("Compiling entry function '")[1:]
    for part in parts:
        local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert local, part
        assert registers, part
        found.append(Code([int(size) for size in local.groups()], int(registers[1])))
    return dict(zip(plain_names([part.split("'")[0] for part in parts]), found, strict=True))


def read_disassembly(text: str) -> dict[str, list[str]]:
    """Read the instructions of each kernel."""
    kernels = re.split(r"\n\s*\.section\s+\.text\.", text)[1:]
    found = [re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", kernel) for kernel in kernels]
    return dict(zip(plain_names([kernel.split(",")[0] for kernel in kernels]), found, strict=True))


def read_ptx(text: str) -> dict[str, list[str]]:
    """Read the instructions of each kernel."""
    kernels = text.split(".entry ")[1:]
    found = [re.findall(r"(?m)^\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s", kernel) for kernel in kernels]
    return dict(zip(plain_names([kernel.split("(")[0] for kernel in kernels]), found, strict=True))


def nvcc(text: str, architecture: str, folder: Path) -> tuple[Path, str]:
    file, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    file.write_text(text)
    options = ["-std=c++17", "-cubin", f"-arch={architecture}", "-I", ROOT / "csrc", "-Xptxas", "-v"]
    return cubin, succeed(find("nvcc"), *options, "-Werror", "all-warnings", "-o", cubin, file)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """Compile all instances once for an architecture; sm_70 by NVRTC, which needs the kernels to include nothing."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param != "sm_70":
        return request.param, *nvcc(source(request.param), request.param, folder)
    library = next(TOOLS.rglob("libnvrtc.so.12"), None)
    if library is None:
        pytest.skip("libnvrtc.so.12 not found; tests/device/requirements.txt names its package")
    options = [f"--gpu-architecture={request.param}", "--std=c++17", f"-I{ROOT / 'csrc'}", "--ptxas-options=-v"]
    cubin, ptx, log = compile_cubin(library, source(request.param), options)
    folder.joinpath("kernels.cubin").write_bytes(cubin)
    folder.joinpath("kernels.ptx").write_text(ptx)
    return request.param, folder / "kernels.cubin", log


@pytest.fixture(scope="module")
def report(compiled):
    architecture, _, log = compiled
    return architecture, read_log(log)


@pytest.fixture(scope="module")
def instructions(compiled):
    architecture, cubin, _ = compiled
    if architecture == "sm_70":
        return architecture, read_ptx(cubin.with_suffix(".ptx").read_text())
    return architecture, read_disassembly(succeed(find("nvdisasm"), "-c", cubin))


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda instance: instance.name)
def test_registers(report, instance):
    architecture, kernels = report
    if architecture not in instance.registers:
        pytest.skip(f"{architecture} has no such matrix units")
    code = kernels[instance.name]
    assert code.local_bytes == [0, 0, 0]
    assert code.registers <= instance.registers[architecture]


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda instance: instance.name)
def test_instructions(instructions, instance):
    architecture, kernels = instructions
    if architecture not in instance.registers:
        pytest.skip(f"{architecture} has no such matrix units")
    found = kernels[instance.name]
    assert [name for name in found if name.startswith(("LDL", "STL", "ld.local", "st.local"))] == []
    expected = instance.sass
    if architecture == "sm_70":
        expected = {PTX[name]: least for name, least in instance.sass.items() if name in PTX}
    for name, least in expected.items():
        assert sum(other == name or other.startswith(f"{name}.") for other in found) >= least, name


def test_instances_are_those_of_the_plan(tmp_path):
    assert len(INSTANCES) <= MOST_INSTANCES
    _, log = nvcc(Path(__file__).with_name("plan.cu").read_text(), "sm_80", tmp_path)
    assert {instance.name for instance in INSTANCES} <= read_log(log).keys()


def test_device_code_includes_device_code_only():
    for path in ROOT.glob("csrc/cuda/*.cuh"):
        included = re.findall(r"(?m)^\s*#\s*include\s*(\S+)", path.read_text())
        assert [name for name in included if not re.fullmatch(r'"cuda/\w+\.cuh"', name)] == [], path.name


def test_reports_are_read():
    spill = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers"""
    assert read_log(spill) == {"f": Code([16, 12, 8], 168)}
    sass = """
	.section	.text._Z1fv,"ax",@progbits
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*05e0*/              @!P0 LDL.64 R2, [R1] ;
.L_x_1:
        /*15f0*/                   FFMA R1, R2, R3, R1 ;"""
    assert read_disassembly(sass) == {"f": ["IMAD.MOV.U32", "LDL.64", "FFMA"]}
    ptx = """
.weak .entry _Z1fv(
	.param .u64 _Z1fv_param_0
)
{
	ld.param.u64 	%rd1, [_Z1fv_param_0];
	@!%p1 bra 	$L__BB0_2;
$L__BB0_2:
	// begin inline asm
	mma.sync.aligned.m8n8k4.col.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f1};
}"""
    assert read_ptx(ptx) == {"f": ["ld.param.u64", "bra", "mma.sync.aligned.m8n8k4.col.col.f32.f16.f16.f32"]}
