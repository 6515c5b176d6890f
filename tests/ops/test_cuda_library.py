"""Why the CUDA kernels cannot be used: every reason, on a machine that only pretends to have a GPU."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bsfast
from bsfast.ops import backend, cuda, plan, triton

CPU_LIBRARY = Path(bsfast.__file__).parent / "lib" / "libbsfast_cpu.so"


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that torch has CUDA and sees devices of these capabilities."""

    def devices(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: capabilities[k])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: f"Pretended {k}")

    for name in (cuda.VARIABLE, "BSFAST_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    return devices


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_library_needs_a_torch_with_cuda(monkeypatch):
    monkeypatch.delenv("BSFAST_NATIVE", raising=False)
    assert cuda.load_cuda() == f"torch {torch.__version__} is built without CUDA"


def test_cuda_library_needs_a_device(pretend):
    pretend()
    assert cuda.load_cuda() == "no CUDA device, or no driver for it, is visible to torch"


def test_cuda_library_is_switched_off(pretend, monkeypatch):
    pretend((9, 0))
    monkeypatch.setenv("BSFAST_NATIVE", "0")
    assert cuda.load_cuda() == "switched off by BSFAST_NATIVE=0"


def test_cuda_library_is_missing(pretend, monkeypatch, tmp_path):
    pretend((9, 0))
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "bsfast" / "ops" / "cuda.py"))
    assert "not built" in cuda.load_cuda()
    assert "with nvcc" in cuda.load_cuda()
    monkeypatch.setenv(cuda.VARIABLE, "/nowhere.so")
    assert cuda.load_cuda() == "BSFAST_CUDA_LIBRARY must name a file, got /nowhere.so"


def test_cuda_library_cannot_be_loaded(pretend, monkeypatch, tmp_path):
    pretend((9, 0))
    text = tmp_path / "text.so"
    text.write_text("no library")
    for path, reason in ((text, "text.so cannot be loaded: "), (CPU_LIBRARY, "bsfast_cuda_architectures")):
        if path.exists():
            monkeypatch.setenv(cuda.VARIABLE, str(path))
            assert reason in cuda.load_cuda()


@pytest.mark.parametrize(
    ("devices", "refused"),
    [
        ([(8, 0)], None),
        ([(8, 9)], None),  # a later device of a generation
        ([(12, 0)], None),  # compiles the PTX of the last one
        ([(7, 5)], "cuda:0 (Pretended 0) is sm_75"),
        ([(9, 0), (7, 0)], "cuda:1 (Pretended 1) is sm_70"),
    ],
)
def test_cuda_library_and_capabilities(pretend, monkeypatch, devices, refused):
    pretend(*devices)
    loaded = []
    monkeypatch.setenv(cuda.VARIABLE, __file__)
    monkeypatch.setattr(cuda, "architectures", lambda path: [(8, 0), (9, 0)])
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    why_not = cuda.load_cuda()
    assert loaded == ([] if refused else [Path(__file__)])
    if refused is None:
        assert why_not is None
    else:
        assert why_not == (
            f"{refused}, and the kernels were compiled for sm_80, sm_90; rebuild them there, or hide that device by "
            "CUDA_VISIBLE_DEVICES"
        )


@pytest.fixture
def pretend_triton(pretend, monkeypatch):
    """Pretend that Triton's kernels can be imported; return the operators that are registered."""
    package, registered = ModuleType("bsfast.triton"), []
    package.OPERATORS = {"batch_norm_out": print}
    package.compile_one = lambda: None
    monkeypatch.setitem(sys.modules, "bsfast.triton", package)
    monkeypatch.setattr(triton.LIBRARY, "impl", lambda name, function, key: registered.append((name, key)))
    return package, registered


def test_triton_is_registered(pretend, pretend_triton):
    pretend((7, 0), (12, 0))
    assert triton.load_triton() is None
    assert pretend_triton[1] == [("batch_norm_out", "CUDA")]


def test_triton_is_tried_outside_of_fake_tensors(pretend, pretend_triton):
    pretend((9, 0))
    made = []
    pretend_triton[0].compile_one = lambda: made.append(torch.empty(1, device="cpu"))
    with FakeTensorMode():  # as in a report, which may be the first to ask
        assert triton.load_triton() is None
    assert type(made[0]) is torch.Tensor


def test_triton_is_found_once_by_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "_why_not", {})
    monkeypatch.setattr(backend, "load_triton", lambda: (time.sleep(0.05), asked.append(1), "why not")[2])
    with ThreadPoolExecutor(4) as pool:
        assert {future.result() for future in [pool.submit(backend.triton_why_not) for _ in range(4)]} == {"why not"}
    assert asked == [1]


def test_triton_needs_a_device_of_capability_7(pretend, pretend_triton, monkeypatch):
    pretend((9, 0), (6, 1))
    assert triton.load_triton() == (
        "cuda:1 (Pretended 1) is sm_61, and Triton needs sm_70 or later; hide that device by CUDA_VISIBLE_DEVICES"
    )
    pretend()
    assert triton.load_triton() == "no CUDA device, or no driver for it, is visible to torch"
    monkeypatch.setenv("BSFAST_NATIVE", "0")
    assert triton.load_triton() == "switched off by BSFAST_NATIVE=0"
    assert pretend_triton[1] == []


def test_triton_cannot_compile(pretend, pretend_triton):
    def fail():
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    pretend((9, 0))
    pretend_triton[0].compile_one = fail
    reason = "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
    assert triton.load_triton() == f"Triton cannot compile a kernel: {reason}"
    assert pretend_triton[1] == []


def test_triton_is_not_installed(pretend, monkeypatch):
    pretend((9, 0))
    for name in [name for name in sys.modules if name.startswith("bsfast.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # import raises ModuleNotFoundError
    assert triton.load_triton() == "Triton is not installed: pip install triton"
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))  # one without what bsfast uses
    assert triton.load_triton().startswith("Triton cannot be imported: ")


@pytest.fixture
def usable(monkeypatch):
    """Pretend that the CUDA kernels are loaded, as far as plans go."""
    monkeypatch.setitem(backend._why_not, "cuda", None)
    monkeypatch.setitem(backend._why_not, "triton", None)


def test_cuda_plans(usable):
    problem = plan.Conv2d("cuda", torch.float32, True, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, False, (32, 32), (8, 8))
    native = plan.Plan("native", "batch-last: samples and positions in the lanes of a warp")
    for choose in (plan.conv2d, plan.conv2d_input_grad, plan.conv2d_weight_grad):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert choose(problem._replace(dtype=dtype)) == native
        stock = plan.Plan("grouped", "torch.float64 has no own kernel")
        assert choose(problem._replace(dtype=torch.float64)) == stock
        assert choose(problem._replace(batch_last=False)).algorithm == "grouped"
    order = plan.memory_order(device="cuda", dtype=torch.float16)
    assert order == plan.Plan("batch_last", "the own kernels take samples innermost only")
    assert plan.memory_order(device="cuda", dtype=torch.float64).algorithm == "contiguous"


def test_cuda_plans_of_what_has_kernels(usable):
    settings = {"device": "cuda", "dtype": torch.bfloat16}
    own = plan.Plan("native", "a thread is a sample: nothing is added up between threads")
    assert plan.conv2d_weight_grad_per_sample(**settings, samples=3) == own
    for operator in ("conv2d", "norm_conv2d", "sample_grad"):
        assert backend.kernel_why_not(operator, "cuda", torch.float16) is None
    assert backend.kernel_why_not("winograd", "cuda", torch.float32) == "no own cuda kernel does this"


def test_cuda_plans_of_normalisations(usable, monkeypatch):
    settings = {"device": "cuda", "dtype": torch.bfloat16, "memory": "batch-last", "piece": "a channel"}
    reason = "batch-last: Triton kernels, whose programs share out a channel"
    assert plan.norm(**settings, has_kernel=True) == plan.Plan("native", reason)
    assert plan.norm(**settings, has_kernel=False) == plan.Plan("aten", "batch-last has no own kernel")
    monkeypatch.setitem(backend._why_not, "triton", "why not")  # whatever CUDA's library can do
    assert plan.norm(**settings, has_kernel=True) == plan.Plan("aten", "why not")
    assert backend.kernel_why_not("conv2d", "cuda", torch.bfloat16) is None
    assert backend.Backend("triton", "cuda", "why not") in backend.backends()


def test_import_does_not_start_cuda():
    code = "import torch; torch.cuda.is_available = None; import bsfast; bsfast.fuse; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "imported\n"


CAPABILITIES = {"a V100 next to newer GPUs": [(9, 0), (7, 0)], "no library": [(9, 0)], "no GPU": []}


@pytest.mark.parametrize("case", CAPABILITIES)
def test_cpu_works_where_cuda_does_not(pretend, monkeypatch, tmp_path, case):
    pretend(*CAPABILITIES[case])
    monkeypatch.setattr(backend, "_why_not", {"cpu": backend._why_not["cpu"]})
    monkeypatch.setenv(cuda.VARIABLE, str(tmp_path) if case == "no library" else __file__)
    monkeypatch.setattr(cuda, "architectures", lambda path: [(8, 0), (9, 0)])
    branches = [torch.nn.Conv2d(3, 4, 3) for _ in range(2)]
    x = torch.randn(5, 3, 6, 6, requires_grad=True)
    bsfast.fuse(branches)(x).sum().backward()
    grad, x.grad = x.grad, None
    sum(branch(x) for branch in branches).sum().backward()
    torch.testing.assert_close(grad, x.grad)
    from bsfast.__main__ import describe

    why_not = backend.native_why_not("cuda")
    assert why_not
    assert f"backend native (cuda)  not used: {why_not}" in describe()
    assert plan.memory_order(device="cuda", dtype=torch.float32) == plan.Plan("contiguous", why_not)
    assert plan.norm(
        device="cuda", dtype=torch.float32, memory="batch-last", has_kernel=True, piece="a channel"
    ) == plan.Plan("aten", backend.triton_why_not())
