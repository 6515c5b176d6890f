"""The README's tables of speed: that they are the records', and that they choose and divide right."""

import json
import re

import pytest

from tests.benchmarks.contestants import COMPILED
from tests.benchmarks.table import BEGIN, END, README, RECORDS, gpu, render, replaced
from tests.gpu.goals import GOALS, NOT_MEASURED
from tests.gpu.works import CLASSIFIER


def timed(**medians):
    return {name: {"median_ms": value} for name, value in medians.items()}


@pytest.fixture
def networks(tmp_path):
    """A record in which the best stock way is another one under each malloc."""
    host = {"machine": "M", "capability": "C", "threads": 2, "torch": "T"}
    step = {
        "tuned": {"gflop": 50.0, "peak_gflops": [100, 200], "results": timed(bsfast=1000.0, loop=3000.0, vmap=9000.0)},
        "default": {
            "gflop": 50.0,
            "peak_gflops": [150, 100],
            "results": timed(bsfast=1500.0, loop=4000.0, vmap=2500.0),
        },
    }
    memory = {"default": {"results": {"bsfast": {"peak_mib": 800}, "loop": {"peak_mib": 400}}}}
    case = {"network": "resnet", "branches": 4, "samples": 8, "widths": [1, 2]}
    works = {"step": step, "memory": memory, "forward": {"skipped": "needs about 9 GiB, more than 8"}}
    record = {"host": host, "environment": {}, "cases": {"a": {**case, "works": works}}}
    (tmp_path / "networks.json").write_text(json.dumps(record))
    return tmp_path


def test_readme_is_what_the_records_say():
    text = README.read_text()
    assert replaced(text, render(RECORDS)) == text, "run python -m tests.benchmarks.table"


def test_render_compares_the_best_over_mallocs(networks):
    text = render(networks)
    assert "| 4, 8, 1-2 | 1000 ms, 25 % | 2500 ms (vmap), 2.50x |" in text
    assert "| needs about 9 GiB, more than 8 |  | 800 MiB | 400 MiB (loop), 0.50x |" in text
    assert "M (C), 2 threads, torch T" in text
    assert "200 GFLOP/s" in text


def test_render_has_as_many_cells_in_every_row(networks):
    for folder in (networks, RECORDS):
        for table in re.findall(r"(?m)(?:^\|.*\|\n)+", render(folder) + "\n"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_render_without_records_says_that_no_gpu_was_measured(tmp_path):
    lines = render(tmp_path).splitlines()
    assert lines[0] == "| H200; M=16, N=128 | 6-12-24-48 | 8-16-32-32 |"
    assert len(lines) == 2 + len(GOALS)
    assert all(line.endswith("| not measured on hardware yet |") for line in lines[2:])


def test_the_place_of_a_record_holds_every_goal():
    record = json.loads((RECORDS / "gpu.json").read_text())
    assert record["goals"] == {goal.text: NOT_MEASURED for goal in GOALS}
    assert gpu(record) == gpu({})


def test_render_reads_the_record_of_a_gpu(tmp_path):
    step, bfloat, half = (f"resnet-M16-N128-6-12-24-48 step {name}" for name in ("float32", "bfloat16", "float16"))
    own = {"bsfast": 4.0, "bsfast, CUDA graph": 2.0}
    entries = {
        step: {"results": timed(**own, loop=60.0, grouped=9.0), "best_stock": "grouped", "floor_ms": 1.6}
        | {"times_faster_than_best_stock": 4.5},
        bfloat: {"results": timed(bsfast=1.5)},
        half: {"results": timed(bsfast=1.6)},
        "resnet-M16-N2000-8-16-32-32 Hessian of the first layers float32": {"results": timed(bsfast=250.0, loop=900.0)},
    }
    entries[bfloat]["results"]["bsfast, CUDA graph"] = {"error": "no memory"}
    record = {"host": {"device": "NVIDIA H100", "capability": "sm_90"}, "entries": entries}
    (tmp_path / "gpu-nvidia-h100.json").write_text(json.dumps(record))
    lines = render(tmp_path).splitlines()
    first, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))
    assert first[0] == "NVIDIA H100; M=16, N=128"
    assert [row[1] for row in rows] == [
        "4.50x (grouped; not compiled)",
        "30.0x",
        "2.00 ms, 1.25 times",
        "1.33x",
        "1.25x (float16)",
        "",
        "",
    ]
    assert [row[2] for row in rows[-2:]] == ["0.25 s", NOT_MEASURED]
    entries[CLASSIFIER] = {"seconds": 171.3}
    (tmp_path / "gpu-nvidia-h100.json").write_text(json.dumps(record))
    assert "| 171 s |\n\nSteps and Hessians: float32 is without TF32" in render(tmp_path)
    assert "cold caches" in render(tmp_path)


def test_gpu_compares_with_what_was_compiled():
    step = "resnet-M16-N128-6-12-24-48 step float32"
    too = f"{step}, torch.compile too"
    refused = {"error": "RuntimeError: no capture"}

    def entry(times: float, **results):
        return {"times_faster_than_best_stock": times, "best_stock": "loop", "floor_ms": 1.0, "results": results}

    def said(entries):
        return gpu({"host": {"device": "D"}, "entries": entries})[2].split("|")[2].strip()

    eager = entry(4.5, **timed(bsfast=1.0, loop=4.5), **{"torch.func.vmap, CUDA graph": refused})
    assert said({step: eager}) == "4.50x (loop; not compiled; 1 graph refused)"
    assert said({step: eager, too: refused}) == "4.50x (loop; not compiled; 1 graph refused)"
    assert said({step: eager, too: entry(3.1, **{COMPILED: {"median_ms": 3.1}})}) == "3.10x (loop)"
    graphs = {f"{name}, CUDA graph": refused for name in (COMPILED, "loop")}
    assert said({step: eager, too: entry(3.1, **{COMPILED: refused}, **graphs)}) == (
        "3.10x (loop; not compiled; 2 graphs refused)"
    )


def test_gpu_says_what_failed():
    step = "resnet-M16-N128-6-12-24-48 step float32"
    entries = {step: {"date": "2030-01-01", "error": f"ValueError: a|b {'and so on ' * 20}"}}
    lines = gpu({"host": {"device": "D"}, "entries": entries})
    assert [line.split(" | ")[1] for line in lines[2:5]] == [
        "failed: ValueError: a\\|b and so on and so on and so on and so on ..."
    ] * 3
    assert lines[2].split(" | ")[2] == f"{NOT_MEASURED} |"
    entries[step] = {"results": {"bsfast": {"median_ms": 1.0}, "loop": {"error": "Full|up"}}, "floor_ms": 1.0} | {
        "times_faster_than_best_stock": 1.0,
        "best_stock": "grouped",
    }
    assert gpu({"host": {"device": "D"}, "entries": entries})[3].split(" | ")[1] == "loop: Full\\|up"


def test_replaced_keeps_what_is_around():
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"


@pytest.mark.parametrize("text", ["none", BEGIN, f"{END} {BEGIN}", f"{BEGIN}{END}{END}", f"{BEGIN}{BEGIN}{END}"])
def test_replaced_needs_both_markers_once(text):
    with pytest.raises(ValueError, match="must have"):
        replaced(text, "new")
