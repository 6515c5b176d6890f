"""The committed record of whole networks: measurements in processes of their own, merged work by work into one file."""

import json
import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments.common.atomic import write_atomically
from tests.benchmarks.network_case import PHASES, NetworkCase

ROOT = Path(__file__).parent.parent.parent
PATH = Path(__file__).parent / "records" / "networks.json"
MALLOCS = ("tuned", "default")
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES")
MOST_BYTES = 8 * 2**30
WORKS = (*PHASES, "memory")


def environment_of(malloc: str) -> dict[str, str]:
    """Return the environment of the Makefile's measurements; with the default malloc, without its settings of it."""
    line = re.search(r"(?m)^FAST := (.*)$", (ROOT / "Makefile").read_text())
    assert line, "the Makefile must define FAST"
    settings = dict(setting.split("=", 1) for setting in line[1].split())
    own = {key: value for key, value in settings.items() if malloc == "tuned" or not key.startswith(ALLOCATOR)}
    return {key: value for key, value in os.environ.items() if not key.startswith((*ALLOCATOR, "OMP_"))} | own


def measure_apart(malloc: str, case: NetworkCase, **order: Any) -> dict[str, Any]:
    """Run :mod:`tests.benchmarks.measure` under a malloc setting and return what it measured."""
    text = json.dumps({"case": case._asdict(), **order})
    command = [sys.executable, "-m", "tests.benchmarks.measure", text]
    done = subprocess.run(command, cwd=ROOT, env=environment_of(malloc), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measure: {text} must succeed, got exit status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def why_skipped(case: NetworkCase, work: str) -> str | None:
    """Say that a work needs more memory than measurements may take."""
    needed = case.bytes_needed()["forward" if work == "forward" else "step"]
    if needed <= MOST_BYTES:
        return None
    return f"needs about {needed / 2**30:.0f} GiB, more than {MOST_BYTES // 2**30}"


def save(case: NetworkCase, work: str, malloc: str, host: dict[str, Any], entry: dict[str, Any]) -> None:
    """Put one work of one case under one malloc setting into the record; works of another host are dropped."""
    record, host = load(PATH), dict(host)
    environment = host.pop("environment")
    if record["host"] != host:
        record |= {"host": host, "environment": {}, "cases": {}}
    record["environment"][malloc] = environment
    entry = {"date": datetime.now(timezone.utc).date().isoformat(), **entry}
    works = record["cases"].setdefault(case.name, {**case._asdict(), "works": {}})["works"]
    works[work] = {**works.get(work, {}), malloc: entry}
    write(record)


def save_skipped(case: NetworkCase, work: str, reason: str) -> None:
    """Say in the record that a work was not measured."""
    record = load(PATH)
    record["cases"].setdefault(case.name, {**case._asdict(), "works": {}})["works"][work] = {"skipped": reason}
    write(record)


def write(record: dict[str, Any]) -> None:
    """Replace the record, cases in their order."""
    record["cases"] = dict(sorted(record["cases"].items(), key=lambda item: order_of(item[1])))
    PATH.parent.mkdir(exist_ok=True)
    write_atomically(PATH, (json.dumps(record, indent=1) + "\n").encode())


def load(path: Path) -> dict[str, Any]:
    """Return a record of networks, an empty one if there is none."""
    return json.loads(path.read_text()) if path.exists() else {"host": {}, "environment": {}, "cases": {}}


def order_of(case: dict[str, Any]) -> tuple[Any, ...]:
    """The centre first, then what differs from it in M, in N and in widths, then other networks."""
    centre = NetworkCase()
    differs = [case["network"] != centre.network, list(case["widths"]) != list(centre.widths)]
    differs += [case["samples"] != centre.samples, case["branches"] != centre.branches]
    return *differs, case["branches"], case["samples"], list(case["widths"])
