"""The scripts for machines with a GPU, on one without: what they say there, and a dry run on the CPU."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bsfast.ops import backend
from experiments.classifier import command
from experiments.classifier.setup import choose
from tests.gpu import __main__ as gpu
from tests.gpu import convolutions, machine, networks, suite, works


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


def test_gpu_networks_run_vmap_last(monkeypatch):
    def contestant(name: str, case):
        return own("loop", case)

    own, timer, peaks = networks.Contestant, machine.Timer("cpu", 0, rounds=1), {"float32": 1.0, "copy_gb_s": 1.0}
    monkeypatch.setattr(networks, "Contestant", contestant)
    entry = networks.measure(works.TINY, "forward", torch.float32, timer, peaks, compiled=True)
    eager = [name for name in entry["results"] if not name.endswith(", CUDA graph")]
    assert eager[-2:] == [networks.COMPILED, networks.VMAP]


def test_gpu_convolutions_are_timed_before_any_capture(monkeypatch):
    class Noting(machine.Timer):
        def run(self, named):
            order.append(f"times {len(named)}")
            return super().run(named)

    def capture(work, device):
        order.append("captures")
        raise RuntimeError("no capture")

    order = []
    monkeypatch.setattr(convolutions, "graphed", capture)
    peaks = {"float32": 1.0, "copy_gb_s": 1.0}
    timer = Noting("cpu", 0, rounds=1)
    entry = convolutions.measure(convolutions.cases(2, 4)[0], "conv2d", torch.float32, timer, peaks)
    assert order == ["times 5", *["captures"] * 5, "times 0"]
    assert sum("error" in values for values in entry["results"].values()) == 5


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


def test_gpu_networks_keep_the_other_ways_when_one_refuses(monkeypatch):
    def contestant(name: str, case):
        if name == "grouped":
            raise NotImplementedError("not these")
        return own(name, case)

    own, timer, peaks = networks.Contestant, machine.Timer("cpu", 0, rounds=1), {"float32": 1.0, "copy_gb_s": 1.0}
    monkeypatch.setattr(networks, "Contestant", contestant)
    monkeypatch.setattr(networks, "WAYS", ("bsfast", "grouped", "loop"))
    entry = networks.measure(works.TINY, "forward", torch.float32, timer, peaks, compiled=False)
    assert entry["results"]["grouped"] == {"error": "NotImplementedError: not these"}
    assert entry["results"].keys() == {
        f"{way}{kind}" for way in ("bsfast", "loop") for kind in ("", ", CUDA graph")
    } | {"grouped"}


def test_gpu_peaks_measure_every_dtype():
    class Counting:
        device = "cpu"

        def run(self, named):
            return {name: {"median_ms": 1e-6 * (k + 1)} for k, name in enumerate(named)}

    peaks = machine.peaks(Counting(), 80)
    assert peaks["float32"] > peaks["bfloat16"] > peaks["float16"] > 0


def test_gpu_full_bench_names_what_decides(monkeypatch, tmp_path):
    def names(*, full: bool):
        given = {"full": full, "tiny": False, "record": None, "budget": None}
        return {name for name, _ in works.works("cpu", **given)}

    few = {f"{case.name} step float16" for case in (works.CENTRE, works.NARROW_FIRST)}
    assert few <= names(full=False)
    monkeypatch.setenv("BSFAST_DATA", str(tmp_path))
    assert works.CLASSIFIER not in names(full=True)
    (tmp_path / "cifar-10-batches-py").mkdir()
    full = {*few, works.CLASSIFIER, *(f"products of 1024 rows, {count} times, float32" for count in (1, 16))}
    assert full <= names(full=True)
    assert works.CLASSIFIER not in names(full=False)


def trains(monkeypatch, done, epochs: int, ended_by: str):
    """Let the classifier end with one process after the other, and a record of what it trained."""

    def run(command, budget):
        folder = Path(command[command.index("--out") + 1], "classifier-1")
        folder.mkdir()
        metrics = {"history": [{}] * epochs, "ended_by": ended_by}
        (folder / "run.json").write_text(json.dumps({"metrics": metrics}))
        return done.pop(0) if done else None

    monkeypatch.setattr(works, "run", run)


@pytest.mark.parametrize(("epochs", "ended_by"), [(30, "time limit"), (29, "epochs")])
def test_gpu_classifier_needs_all_epochs(monkeypatch, epochs, ended_by):
    trains(monkeypatch, [subprocess.CompletedProcess([], 0, "Data: CIFAR-10.", "")], epochs, ended_by)
    with pytest.raises(RuntimeError, match=f"must train 30 epochs, got {epochs}, ended by {ended_by}"):
        works.train_classifier(suite.Budget(1))


def test_gpu_classifier_trains_one_model_without_a_limit():
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    command.add_arguments(parser)
    given = vars(parser.parse_args(works.OPTIONS))
    setup = choose(given.pop("budget"), given | {"device": "cpu"}, train_images=50_000, test_images=10_000)
    assert (setup.sizes, setup.epochs, setup.time_limit) == ([16], 30, 1e6)


def test_gpu_classifier_needs_its_data(monkeypatch):
    said = [
        (0, "Data: CIFAR-10 from here.", ""),
        (0, "Data: digits.", ""),
        (1, "Data: CIFAR-10 from here.", "a\nno GPU"),
    ]
    trains(monkeypatch, [subprocess.CompletedProcess([], *of_one) for of_one in said], 30, "epochs")
    entry = works.train_classifier(suite.Budget(1))
    assert entry.keys() == {"seconds", "epochs", "ended_by", "clocks"}
    assert (entry["epochs"], entry["ended_by"]) == (30, "epochs")
    with pytest.raises(RuntimeError, match="must train on CIFAR-10, got status 0: Data: digits"):
        works.train_classifier(suite.Budget(1))
    with pytest.raises(RuntimeError, match="got status 1: no GPU"):
        works.train_classifier(suite.Budget(1))
    assert works.train_classifier(suite.Budget(1)) is None


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
