"""What is asked of a GPU, and what its record says: the README's table."""

from collections.abc import Callable
from textwrap import shorten
from typing import Any, NamedTuple

from tests.benchmarks.contestants import COMPILED, OWN
from tests.gpu.works import CENTRE, CLASSIFIER, CURVED, NARROW_FIRST, name_of_hessian

NOT_MEASURED = "not measured on hardware yet"
NETWORKS = (NARROW_FIRST, CENTRE)
Entries = dict[str, Any]
Read = Callable[[Entries], str]


class Goal(NamedTuple):
    """One number that is asked for.

    Attributes:
        text: What is asked.
        read: For each of the two networks, from the entries of a record to what it says; raises NotMeasuredError where
            it lacks the entry, or the entry has an error. None where nothing is asked of a network.
    """

    text: str
    read: tuple[Read | None, Read | None]


class NotMeasuredError(Exception):
    """A record lacks an entry, or has its error, which the message tells."""


def measured(entries: Entries, name: str) -> Entries:
    """Return an entry, or raise NotMeasuredError."""
    if name not in entries:
        raise NotMeasuredError
    if "error" in entries[name]:
        raise NotMeasuredError(f"failed: {first_words(entries[name]['error'])}")
    return dict(entries[name])


def first_words(error: str) -> str:
    """Shorten an error for a cell of a table."""
    return shorten(error, 60, placeholder=" ...").replace("|", "\\|")


def own_ms(entry: Entries) -> float:
    """Least time of bsfast, eager or as a CUDA graph."""
    ways = (values for name, values in entry["results"].items() if name.startswith(OWN) and "error" not in values)
    return float(min(values["median_ms"] for values in ways))


def faster_than_stock(name: str) -> Read:
    def read(entries: Entries) -> str:
        whole = f"{name}, torch.compile too"
        entry = measured(entries, whole if "error" not in entries.get(whole, {"error": "absent"}) else name)
        results = entry["results"]
        refused = sum(way.endswith(", CUDA graph") and "error" in values for way, values in results.items())
        lacks = "; not compiled" if "error" in results.get(COMPILED, {"error": "absent"}) else ""
        lacks += f"; {refused} graph{'s' * (refused > 1)} refused" if refused else ""
        return f"{entry['times_faster_than_best_stock']:.2f}x ({entry['best_stock']}{lacks})"

    return read


def faster_than_loop(name: str) -> Read:
    def read(entries: Entries) -> str:
        loop = measured(entries, name)["results"]["loop"]
        return (
            f"loop: {first_words(loop['error'])}"
            if "error" in loop
            else f"{loop['median_ms'] / own_ms(measured(entries, name)):.1f}x"
        )

    return read


def near_floor(name: str) -> Read:
    def read(entries: Entries) -> str:
        entry = measured(entries, name)
        return f"{own_ms(entry):.2f} ms, {own_ms(entry) / entry['floor_ms']:.2f} times"

    return read


def faster_in_16_bits(name: str, other: str) -> Read:
    return lambda entries: f"{own_ms(measured(entries, other)) / own_ms(measured(entries, name)):.2f}x"


def seconds(name: str) -> Read:
    return lambda entries: f"{1e-3 * own_ms(measured(entries, name)):.2f} s"


def never_slower(names: tuple[str, ...], other: str) -> Read:
    def read(entries: Entries) -> str:
        ratio, name = min((own_ms(measured(entries, other)) / own_ms(measured(entries, name)), name) for name in names)
        return f"{ratio:.2f}x ({name.split()[-1]})"

    return read


def of_classifier(entries: Entries) -> str:
    return f"{measured(entries, CLASSIFIER)['seconds']:.0f} s"


FULL, BFLOAT, HALF = (
    [f"{case.name} step {dtype}" for case in NETWORKS] for dtype in ("float32", "bfloat16", "float16")
)
GOALS = [
    Goal("step: 3x the fastest stock way, compiled and CUDA graphs included", tuple(map(faster_than_stock, FULL))),
    Goal("step: 10x the plain loop", tuple(map(faster_than_loop, FULL))),
    Goal("step: at most 2 times the floor of memory and arithmetic", tuple(map(near_floor, FULL))),
    Goal("step: bfloat16 faster than float32", tuple(map(faster_in_16_bits, BFLOAT, FULL))),
    Goal(
        "step: float16 and bfloat16 not slower than float32",
        tuple(map(never_slower, zip(BFLOAT, HALF, strict=True), FULL)),
    ),
    Goal("exact Hessian of the first layers, N=2000: under 1 s", (None, seconds(name_of_hessian(CURVED)))),
    Goal("30 epochs of CIFAR-10 with the figures: under 3 minutes", (None, of_classifier)),
]


def table(record: dict[str, Any]) -> list[list[str]]:
    """Set each goal beside what a record says of it for each network.

    Args:
        record: Of a GPU; or what is said instead of each goal, in ``"goals"``; or empty.
    """
    entries, instead = record.get("entries", {}), record.get("goals", {})

    def said(goal: Goal, read: Read | None) -> str:
        try:
            return read(entries) if read else ""
        except NotMeasuredError as error:
            return str(error) or str(instead.get(goal.text, NOT_MEASURED))

    return [[goal.text, *(said(goal, read) for read in goal.read)] for goal in GOALS]
