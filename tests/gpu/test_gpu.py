"""The scripts for machines with a GPU, on one without: what they say there, and a dry run on the CPU."""

import json
import subprocess
import sys

import pytest
import torch

from bsfast.ops import backend
from tests.gpu import __main__ as gpu
from tests.gpu import networks, suite, works


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_says_that_there_is_none():
    command = [sys.executable, "-m", "tests.gpu", "test", "bench"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=gpu.ROOT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("tests.gpu: needs a GPU: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("work", "missing"), [("bench", "torch"), ("test", "pytest_benchmark"), ("sanitize", "pytest, hypothesis")]
)
def test_gpu_says_which_packages_are_missing(monkeypatch, capsys, work, missing):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in missing.split(", ") else name)
    assert gpu.main([work]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"tests.gpu: needs {missing}, got ")
    assert said.count("\n") == 1


def test_gpu_makes_a_clone_importable(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **settings: commands.append(command[1:]))
    gpu.make_importable()
    assert commands == []

    def nothing(name: str) -> str:
        raise gpu.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpu.importlib.metadata, "version", nothing)
    gpu.make_importable()
    assert commands == [["setup.py", "-q", "egg_info"]]


@pytest.fixture
def dry(tmp_path, capsys):
    """Run works on the CPU; return the exit status, what was said, and the entries of the record."""

    def run(*arguments: str):
        status = gpu.main([*arguments, "--device=cpu", "--tiny", f"--records={tmp_path}"])
        said = capsys.readouterr().out
        content = [json.loads(path.read_text()) for path in tmp_path.glob("gpu-*.json")]
        return status, said, content[0] if content else {"entries": {}}

    return run


def test_gpu_bench_measures_everything_once(dry):
    status, said, record = dry("bench")
    assert status == 0
    assert record["host"]["torch"] == torch.__version__
    entries = record["entries"]
    assert entries["limits"]["copy_gb_s"] > 0
    step = entries["resnet-M2-N4-2-2-2-2 step float32"]
    assert {"resnet-M2-N4-2-2-2-2 step bfloat16", "resnet-M2-N4-2-2-2-2 step float16"} <= entries.keys()
    assert {"bsfast", "loop", "grouped", "torch.func.vmap", "loop, channels_last", "merged to dense groups"} <= step[
        "results"
    ].keys()
    assert all(f"{name}, CUDA graph" in step["results"] for name in networks.WAYS)
    assert step["floor_ms"] > 0
    rates = {"tflop_s", "gb_s", "share_of_floor"}
    for entry in (value for name, value in entries.items() if name != "limits"):
        assert all(rates <= values.keys() for values in entry["results"].values())
    convolution = next(value for name, value in entries.items() if name.startswith("conv2d_weight_grad"))
    assert convolution["results"]["bsfast"]["rounds"] == 2
    assert {"loop, CUDA graph", "grouped, channels_last, CUDA graph"} <= convolution["results"].keys()
    assert {"bsfast", "torch.bmm"} <= entries["products of 5 rows, 2 times, float32"]["results"].keys()
    assert said.count("measured") == len(entries)
    assert "measured" not in dry("bench")[1]


def test_gpu_bench_stops_when_time_is_up(dry):
    status, said, record = dry("bench", "--seconds=1e-9")
    assert status == 2
    assert "time is up before limits; call again to go on" in said
    assert record["entries"] == {}


def test_gpu_bench_records_errors_and_measures_again(dry, monkeypatch):
    class OutOfResourcesError(Exception):
        """As Triton's, of no family that torch knows."""

    def refuse():
        raise OutOfResourcesError("shared memory\nwith details")

    named = [("refuses", refuse), ("works", dict), ("is cut off", lambda: None), ("never begins", dict)]
    monkeypatch.setattr(works, "works", lambda *_, **__: named)
    for _ in range(2):
        status, said, record = dry("bench")
        assert status == 1
        assert record["entries"].keys() == {"refuses", "works"}
        assert record["entries"]["refuses"]["error"] == "OutOfResourcesError: shared memory"
        assert "time is up during is cut off; call again to go on" in said
    named[0] = "refuses", dict
    assert dry("bench")[0] == 2
    del named[2]
    assert dry("bench")[0] == 0


def test_gpu_bench_stops_after_a_refused_capture(dry, monkeypatch):
    results = {"loop": {"median_ms": 1.0}, "loop, CUDA graph": {"error": "RuntimeError: no capture"}}
    named = [("first", lambda: {"results": results}), ("second", lambda: {"results": results})]
    monkeypatch.setattr(works, "works", lambda *_, **__: named)
    status, said, record = dry("bench")
    assert (status, record["entries"].keys()) == (2, {"first"})
    assert "a refused capture may spoil what follows: call again to go on\n" in said
    assert record["entries"]["first"]["results"] == results
    status, said, record = dry("bench")
    assert (status, record["entries"].keys()) == (0, {"first", "second"})
    assert "spoil" not in said


def test_gpu_digest_covers_what_a_number_depends_on(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    names = ("CMakeLists.txt", "experiments/classifier/run.py", "csrc/a.cu", "bsfast/a.py", "tests/a.py")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    known = {gpu.digest("cpu")}
    for name in names:
        (tmp_path / name).write_text(name)
        known.add(gpu.digest("cpu"))
    assert len(known) == 1 + len(names)


def test_gpu_needs_triton_and_what_builds(monkeypatch):
    monkeypatch.setenv("BSFAST_CUDA_LIBRARY", "named")
    monkeypatch.setattr(backend, "native_why_not", lambda device: None)
    monkeypatch.setattr(backend, "triton_why_not", lambda: "Triton is not installed")
    assert gpu.find_library() == "Triton is not installed"
    monkeypatch.delenv("BSFAST_CUDA_LIBRARY")
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: None if tool == "nvcc" else tool)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: "nowhere")
    reason = (
        "nvcc, Python's package pybind11, nowhere/Python.h not found; BSFAST_CUDA_LIBRARY may name a library built "
    )
    assert gpu.find_library() == f"{reason}elsewhere"


@pytest.fixture
def ran(dry, monkeypatch):
    """Commands of works on CUDA, which say and return what is given."""

    def run(work, given, *said: str):
        commands, left = [], list(said)

        def run(command, budget, **environment):
            commands.append(command)
            text = left.pop(0) if left else said[-1]
            return None if text == "cut off" else subprocess.CompletedProcess(command, 0, text, "")

        monkeypatch.setattr(suite, "run", run)
        monkeypatch.setattr(suite.shutil, "which", lambda tool: tool)
        record = Memory()
        return work(gpu.parse(given), record, suite.Budget(60)), commands, record.entries

    return run


class Memory:
    """A record that no file holds."""

    def __init__(self) -> None:
        self.entries = {}

    def has(self, name: str) -> bool:
        return name in self.entries

    def put(self, name: str, entry) -> None:
        self.entries[name] = entry


def test_gpu_tests_that_all_skip_fail_on_cuda_only(ran):
    for device, expected in (("cuda", [True, False]), ("cpu", [True, True])):
        given = ["test", f"--device={device}", "--tests", "a", "b"]
        failed, _, entries = ran(suite.run_tests, given, "3 passed, 1 skipped in 1.00s", "4 skipped in 1.00s")
        assert [entry["passed"] for entry in entries.values()] == expected
        assert failed == expected.count(False)


def test_gpu_tests_that_are_cut_off_are_not_recorded(ran, capsys):
    failed, commands, entries = ran(suite.run_tests, ["test", "--tests", "a", "b", "c"], "1 passed in 1.00s", "cut off")
    assert (failed, len(commands), entries.keys()) == (0, 2, {"test a"})
    assert "time is up during test b; call again to go on" in capsys.readouterr().out


def test_gpu_cuts_commands_off():
    assert suite.run([sys.executable, "-c", "import time; time.sleep(60)"], suite.Budget(0.2)) is None


def test_gpu_sanitizes_every_direct_call_by_itself(ran):
    _, commands, entries = ran(suite.sanitize, ["sanitize"], "1 passed in 1.00s")
    assert len(entries) == len(commands) == 2 * len(suite.SANITIZED)
    assert "sanitize racecheck ops/test_conv_cuda.py float16 and not bfloat16" in entries
    assert "sanitize memcheck ops/test_gram_triton.py" in entries
    assert all(command[0] == "compute-sanitizer" for command in commands)
    assert all(("--report-api-errors=no" in command) == ("--tool=memcheck" in command) for command in commands)
    assert all("--device=cuda" in command for command in commands if command[-1] == "-rs")


def test_gpu_names_tests_that_exist():
    names = {*suite.TESTS, *(name for name, *_ in suite.SANITIZED)}
    assert [name for name in names if not (suite.ROOT / "tests" / name).is_file()] == []


def test_gpu_tests_run_once_and_failures_again(dry, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')")
    for name, value in (("passes", True), ("fails", False)):
        (tmp_path / "tests" / f"test_{name}.py").write_text(f"def test_it(): assert {value}")
    for _ in range(2):
        status, said, record = dry("test", "--tests", "test_passes.py", "test_fails.py")
        assert status == 1
        assert "test test_fails.py: FAILED" in said
        assert {name: entry["passed"] for name, entry in record["entries"].items()} == {
            "test test_passes.py": True,
            "test test_fails.py": False,
        }
    assert "passes" not in said
