"""The benchmarks themselves, on tiny networks: that contestants agree, that counts are right, that records merge."""

import json

import pytest
import torch

from bsfast.ops.backend import native_why_not
from tests.benchmarks import network_record
from tests.benchmarks.contestants import CONTESTANTS, LAST, MERGED, Contestant
from tests.benchmarks.grouped import MergedConv2d
from tests.benchmarks.host import why_busy
from tests.benchmarks.measure import largest_difference, measure_memory, measure_time, summary
from tests.benchmarks.network_case import PHASES, NetworkCase
from tests.benchmarks.network_record import environment_of, load, measure_apart, save, save_skipped, why_skipped

WHY_NOT = native_why_not("cpu")
needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}")
TINY = NetworkCase(branches=2, samples=4, widths=(2, 3, 4, 5))
TINY_GENERATOR = NetworkCase("generator", branches=2, samples=2, widths=(2, 3))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def record_path(tmp_path, monkeypatch):
    monkeypatch.setattr(network_record, "PATH", tmp_path / "networks.json")
    return tmp_path / "networks.json"


@pytest.mark.parametrize("case", [TINY, TINY_GENERATOR], ids=lambda case: case.name)
def test_contestants_agree_and_train_alike(case):
    contestants = {name: Contestant(name, case) for name in (*CONTESTANTS, MERGED, f"{MERGED}{LAST}")}
    assert largest_difference(contestants) < 1e-5
    before = contestants["loop"].forward()
    for contestant in contestants.values():
        contestant.ready("step")
        contestant.step()
    assert largest_difference(contestants) < 1e-4
    assert (contestants["loop"].forward() - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", [*CONTESTANTS, MERGED])
def test_largest_difference_sees_one_parameter(name):
    contestants = {other: Contestant(other, TINY) for other in (*CONTESTANTS, MERGED)}
    with torch.no_grad():
        next(contestants[name].net.parameters()).add_(0.5)
    assert largest_difference(contestants) > 1e-3


@pytest.mark.parametrize(
    ("groups", "channels", "merged"), [(16, 6, 16), (16, 8, 16), (16, 48, 2), (7, 48, 1), (4, 96, 1)]
)
def test_merged_groups_are_about_96_channels(groups, channels, merged):
    layer = MergedConv2d(torch.nn.Conv2d(groups * channels, groups * channels, 3, groups=groups))
    assert layer.merged == merged
    assert layer.conv.weight.shape == (groups * channels, channels, 3, 3)


def test_operations_of_the_paper_s_classifier():
    case = NetworkCase()
    images, stem = 16 * 128, 2 * 9 * 3 * 8 * 32 * 32
    stages = [(8, 8, 32), (8, 16, 16), (16, 32, 8), (32, 32, 4)]
    convolutions = sum(2 * 9 * size**2 * (c * d + 3 * d * d) for c, d, size in stages)
    shortcuts = sum(2 * size**2 * c * d for c, d, size in stages[1:3])
    shortcuts += 2 * 4**2 * 32 * 32  # equal widths, but half the size
    forward = images * (stem + convolutions + shortcuts + 2 * 32 * 10)
    assert case.operations() == {"forward": forward, "step": 3 * forward - images * stem}


def test_why_skipped_beyond_eight_gib():
    assert [why_skipped(NetworkCase(branches=64), work) for work in (*PHASES, "memory")] == [None] * 3
    large = NetworkCase(branches=256)
    assert why_skipped(large, "forward") is None
    assert why_skipped(large, "step") == why_skipped(large, "memory") == "needs about 18 GiB, more than 8"


def test_why_busy():
    assert why_busy([180.0, 200.0], 100.0, 2) is None
    assert "2 threads reached 150" in why_busy([200.0, 150.0], 100.0, 2)
    assert "one 100" in why_busy([120.0, 120.0], 100.0, 2)


def test_environment_of_differs_in_malloc_only(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    tuned, default = environment_of("tuned"), environment_of("default")
    assert tuned["MALLOC_MMAP_MAX_"] == "0"
    assert {key for key in tuned if tuned[key] != default.get(key)} == {
        key for key in tuned if key.startswith(("MALLOC_", "GLIBC_"))
    }
    assert not any(key.startswith("MALLOC_") for key in default)
    assert "MALLOC_ARENA_MAX" not in tuned


@needs_kernels
def test_measure_time_one_round():
    result = measure_time(TINY, PHASES, seconds=0, rounds=1)
    assert list(result["times"]) == list(PHASES)
    for of_phase in result["times"].values():
        assert list(of_phase) == list(CONTESTANTS)
        assert all(values["rounds"] == 1 and values["median_ms"] > 0 for values in of_phase.values())
    assert result["difference"] < 1e-5


@needs_kernels
def test_measure_time_without_time_does_three_rounds():
    result = measure_time(TINY, ("forward",), seconds=0)
    assert {values["rounds"] for values in result["times"]["forward"].values()} == {3}


def test_summary_quartiles():
    assert summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median_ms": 3.0, "quartiles_ms": [1.5, 4.5], "rounds": 5}


@needs_kernels
def test_measure_apart_memory_is_what_backward_needs():
    case = NetworkCase(branches=1, samples=48)
    not_the_child_s = torch.ones(2**28)  # 1 GiB
    large = measure_apart("default", case, measure="memory", name="loop")
    held = case.bytes_needed()["step"] / 2**20
    assert held < large["growth_mib"] < 4 * held
    assert large["growth_mib"] < large["peak_mib"] < not_the_child_s.nbytes / 2**20
    assert not any("MALLOC_" in setting for setting in large["host"]["environment"])


def test_measure_apart_shows_what_failed():
    with pytest.raises(RuntimeError, match=r"(?s)must succeed, got exit status 1:.*KeyError: 'no such contestant'"):
        measure_apart("tuned", TINY, measure="memory", name="no such contestant")


def test_measure_memory_in_process():
    assert measure_memory(TINY, "loop")["peak_mib"] > 0


def test_save_merges_works_and_keeps_one_host(record_path):
    host = {"machine": "a", "threads": 2, "environment": ["MALLOC_X=0"]}
    save(TINY_GENERATOR, "step", "tuned", host, {"results": 1})
    save(TINY, "step", "tuned", host, {"results": 2})
    save(TINY, "step", "default", host | {"environment": []}, {"results": 3})
    save(TINY, "step", "tuned", host, {"results": 4})
    save_skipped(TINY, "memory", "too large")
    record = load(record_path)
    assert record["host"] == {"machine": "a", "threads": 2}
    assert record["environment"] == {"tuned": ["MALLOC_X=0"], "default": []}
    assert list(record["cases"]) == [TINY.name, TINY_GENERATOR.name]
    works = record["cases"][TINY.name]["works"]
    assert {malloc: entry["results"] for malloc, entry in works["step"].items()} == {"tuned": 4, "default": 3}
    assert works["memory"] == {"skipped": "too large"}
    assert json.loads(record_path.read_text())["cases"][TINY.name]["widths"] == [2, 3, 4, 5]
    save(TINY, "forward", "tuned", host | {"machine": "b"}, {"results": 5})
    assert list(load(record_path)["cases"]) == [TINY.name]
    assert list(load(record_path)["cases"][TINY.name]["works"]) == ["forward"]
