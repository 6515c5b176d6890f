"""The scripts for machines with a GPU, on one without: what they say there, and a dry run on the CPU."""

import json
import subprocess
import sys

import pytest
import torch

from tests.gpu import __main__ as gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_says_that_there_is_none():
    command = [sys.executable, "-m", "tests.gpu", "test", "bench"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=gpu.ROOT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("tests.gpu: needs a GPU: ")
    assert done.stderr.count("\n") == 1


def test_gpu_says_that_torch_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.main(["test"]) == 1
    assert capsys.readouterr().err.startswith("tests.gpu: needs torch, got ")


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
    assert {"bsfast", "loop", "grouped", "torch.func.vmap", "loop, channels_last", "merged to dense groups"} <= step[
        "results"
    ].keys()
    assert step["floor_ms"] > 0
    convolution = next(value for name, value in entries.items() if name.startswith("conv2d_weight_grad"))
    assert convolution["results"]["bsfast"]["rounds"] == 2
    assert {"tflop_s", "gb_s", "share_of_floor"} <= convolution["results"]["loop, CUDA graph"].keys()
    assert {"bsfast", "torch.bmm"} <= entries["products of 5 rows, 2 times, float32"]["results"].keys()
    assert said.count("measured") == len(entries)
    assert "measured" not in dry("bench")[1]


def test_gpu_bench_stops_when_time_is_up(dry):
    _, said, record = dry("bench", "--seconds=1e-9")
    assert "time is up before limits; call again to go on" in said
    assert record["entries"] == {}


def test_gpu_tests_run_once_and_failures_again(dry, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
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
