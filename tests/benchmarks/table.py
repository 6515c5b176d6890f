"""The README's tables of speed, from the committed records: ``python -m tests.benchmarks.table`` writes them.

Nothing between the README's two markers is written by hand, and a test compares it to the records.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from tests.benchmarks.contestants import OWN, TILES
from tests.benchmarks.network_record import MALLOCS
from tests.gpu import goals

README = Path(__file__).parent.parent.parent / "README.md"
RECORDS = Path(__file__).parent / "records"
BEGIN, END = "<!-- begin: python -m tests.benchmarks.table -->", "<!-- end -->"
GPU_CONDITIONS = (
    "Steps and Hessians: float32 is without TF32, in all ways. Steps: medians of 20 to 60 rounds between CUDA events, "
    "with cold caches, for 256 MiB are written before each; one way after the other. Hessians: medians of 3 calls by "
    "the wall clock, caches as they are. CIFAR-10: once, in 16 bits, from the start of the process to its report."
)
TITLES = {"resnet": "classifier", "generator": "generator, 64 pixels"}


class Best(NamedTuple):
    """The least value of some contestants under any malloc setting, and who reached it."""

    value: float
    name: str
    malloc: str


def best(results: dict[str, dict[str, Any]], key: str, accept: Callable[[str], bool]) -> Best:
    """Find the least value.

    Args:
        results: For each malloc setting, each contestant's values.
        key: Which value.
        accept: Whether a contestant counts.
    """
    return min(
        Best(values[key], name, malloc)
        for malloc, of_malloc in results.items()
        for name, values in of_malloc.items()
        if accept(name)
    )


def is_own(name: str) -> bool:
    return name in {OWN, TILES} or name.startswith(("conv2d", "kernel"))


def cells(own: Best, stock: Best, unit: str, share: float | None = None) -> list[str]:
    """Return the own value, with its share of the hardware's limit, and the best stock one with what it costs more."""
    of_limit = "" if share is None else f", {100 * share:.0f} %"
    ratio = stock.value / own.value
    return [f"{number(own.value)} {unit}{of_limit}", f"{number(stock.value)} {unit} ({stock.name}), {ratio:.2f}x"]


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def row(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"


def networks(record: dict[str, Any]) -> list[str]:
    """One line for each case that has a training step, a forward pass or memory in the record."""
    if not record.get("cases"):
        return []
    heads = ["training step", "best stock way", "forward, eval mode", "best stock way"]
    heads = ["M, N, widths", *heads, "peak memory of a step", "least stock way"]
    lines = [row(heads), row("---" for _ in heads)]
    for case in record["cases"].values():
        title = f"{case['branches']}, {case['samples']}, {'-'.join(map(str, case['widths']))}"
        if case["network"] != "resnet":
            title += f" ({TITLES[case['network']]})"
        works = (network_cells(case["works"].get(work, {}), work) for work in ("step", "forward", "memory"))
        lines.append(row([title, *(cell for pair in works for cell in pair)]))
    entries = [entry for case in record["cases"].values() for work in case["works"].values() for entry in work.values()]
    peaks = [peak for entry in entries if isinstance(entry, dict) for peak in entry.get("peak_gflops", [])]
    what = "The paper's classifier, a slim ResNet-18 of 32-pixel images, where no other network is named. "
    return [*lines, "", fill(what + conditions(record["host"], max(peaks, default=0.0), "3 to 20 rounds"), 120)]


def network_cells(work: dict[str, Any], kind: str) -> list[str]:
    """Two cells of one work; a work that was skipped says why, one that was not measured is empty."""
    if not work:
        return ["", ""]
    if "skipped" in work:
        return [work["skipped"], ""]
    key, unit = ("peak_mib", "MiB") if kind == "memory" else ("median_ms", "ms")
    results = {malloc: entry["results"] for malloc, entry in work.items()}
    own = best(results, key, lambda name: name == OWN)
    share = None
    if kind != "memory":
        entry = work[own.malloc]
        share = entry["gflop"] / max(entry["peak_gflops"]) / (1e-3 * own.value)
    first, *others = cells(own, best(results, key, lambda name: not is_own(name)), unit, share)
    if TILES in results[own.malloc]:
        first += f"; by 4x4 tiles {number(best(results, key, lambda name: name == TILES).value)} {unit}"
    return [first, *others]


def convolutions(records: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each size, with the operator that users call and its two gradients.

    Args:
        records: For each malloc setting its record of convolutions.
    """
    by_size: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for malloc, record in records.items():
        for size in record["sizes"]:
            key = size["stride"], -size["kernel"], size["channels"], size["out_channels"], -size["size"]
            by_size.setdefault(key, {}).setdefault(size["operator"], {})[malloc] = size
    if not by_size:
        return []
    names = {"conv2d": "forward", "conv2d_input_grad": "input gradient", "conv2d_weight_grad": "weight gradient"}
    heads = ["convolution", *(head for name in names.values() for head in (name, "best stock way"))]
    lines = [row(heads), row("---" for _ in heads)]
    for (stride, kernel, channels, out_channels, size), operators in sorted(by_size.items()):
        title = f"{-kernel}x{-kernel}, {channels} to {out_channels} channels, {-size}x{-size}"
        entries = [title + (f", stride {stride}" if stride > 1 else "")]
        for name in names:
            entries += convolution_cells(operators.get(name, {}), name)
        lines.append(row(entries))
    record = next(iter(records.values()))
    work = record["work"]
    peak = max(size["peak_gflops"] for record in records.values() for size in record["sizes"])
    what = f"Convolutions of M={work['branches']} branches, N={work['samples']}. "
    return [*lines, "", fill(what + conditions(record["host"], peak, f"{work['rounds']} rounds"), 120)]


def convolution_cells(by_malloc: dict[str, dict[str, Any]], name: str) -> list[str]:
    if not by_malloc:
        return ["", ""]
    results = {malloc: size["results"] for malloc, size in by_malloc.items()}
    own = best(results, "median_ms", lambda other: other == name)
    share = results[own.malloc][name]["median_gflops"] / by_malloc[own.malloc]["peak_gflops"]
    return cells(own, best(results, "median_ms", lambda other: not is_own(other)), "ms", share)


def toys(record: dict[str, Any]) -> list[str]:
    if not record.get("branches"):
        return []
    ratios = {M: f"{times['torch_ms'] / times['bsfast_ms']:.0f}" for M, times in record["branches"].items()}
    ways = f"M={' / '.join(ratios)}: {' / '.join(ratios.values())} times faster than batched torch"
    return [f"{record['trials']} toys trained to the end, {ways}."]


def gpu(record: dict[str, Any]) -> list[str]:
    """What is asked of a GPU with M=16 branches and N=128, and what was reached: its record or what is in its place."""
    device = record["host"]["device"] if record else "H200"
    heads = [f"{device}; M=16, N=128", *("-".join(map(str, case.widths)) for case in goals.NETWORKS)]
    lines = [row(heads), row("---" for _ in heads), *map(row, goals.table(record))]
    return [*lines, "", fill(GPU_CONDITIONS, 120)] if "entries" in record else lines


def conditions(host: dict[str, Any], peak: float, rounds: str) -> str:
    """Return what a number in a table depends on."""
    machine = f"{host['machine']} ({host['capability']}), {host['threads']} threads, torch {host['torch']}, float32"
    return (
        f"{machine}; medians of {rounds}, contestants in turns, each with the better of two malloc settings. % is the "
        f"part of the FMA peak, {peak:.0f} GFLOP/s, that the multiplications and additions of direct convolutions "
        "and of matrices reach; Winograd's tiles need fewer, so that it can be more than 100. x is what the best stock "
        "way costs over what bsfast does."
    )


def render(folder: Path) -> str:
    """Return what the records say, as Markdown.

    Args:
        folder: Holds the records; those that are missing say nothing.
    """

    def load(name: str) -> dict[str, Any]:
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    of_malloc = {malloc: load(f"conv-{malloc}-malloc") for malloc in MALLOCS}
    hosts = [machine_of(record) for record in of_malloc.values() if record]
    of_malloc = {malloc: record for malloc, record in of_malloc.items() if record and machine_of(record) == hosts[0]}
    of_gpus = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    of_gpus = [record for record in of_gpus if "capability" in record["host"] and not record["host"].get("tiny")]
    parts = [
        networks(load("networks")),
        convolutions(of_malloc),
        toys(load("toy")),
        *map(gpu, of_gpus or [load("gpu")]),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def machine_of(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record["host"].items() if key != "environment"}


def replaced(text: str, table: str) -> str:
    """Put a table between the markers.

    Raises:
        ValueError: If the text has not each marker once, in their order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"table: the README must have {BEGIN} and {END} once each, in this order")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


if __name__ == "__main__":
    README.write_text(replaced(README.read_text(), render(RECORDS)))
