"""What is measured on a GPU, in order of weight."""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.network_case import PHASES, NetworkCase
from tests.cases import TRIPLE
from tests.gpu import convolutions, grams, hessians, machine, networks
from tests.gpu.record import Record
from tests.gpu.suite import ROOT, Budget, run

CENTRE = NetworkCase()
NARROW_FIRST = CENTRE._replace(widths=(6, 12, 24, 48))
AROUND = [CENTRE._replace(branches=M) for M in (2, 64)] + [CENTRE._replace(samples=N) for N in (8, 512)]
TINY = NetworkCase(branches=2, samples=4, widths=(2, 2, 2, 2))
CURVED = CENTRE._replace(samples=2000)
SECONDS = 1.0  # for the rounds of all ways of a convolution, or of one way of a network
PRODUCTS = ((CENTRE.branches, 216), (1, CENTRE.branches * 216))  # of each branch, and of all: a first layer's Hessian
NEAR_FEW = ((CENTRE.branches, 1024), (1, 1024))  # where bsfast.ops.gram leaves them to stock products
CONV_QUICK, CONV_TINY = 4, 1  # how many of the convolutions
CLASSIFIER = "classifier of CIFAR-10, budget gpu"
EPOCHS = 30
# The main model alone, and no time limit that shortens the schedule: this one is far away.
OPTIONS = ("--budget=gpu", f"--epochs={EPOCHS}", "--branches=16", "--all-m=16", "--time-limit=1000000")
CIFAR = re.compile(r"cifar-?10(?!\d)", re.IGNORECASE)
Work = Callable[[], dict[str, Any] | None]  # None: cut off, as time is up


def works(device: str, *, full: bool, tiny: bool, record: Record, budget: Budget) -> Iterator[tuple[str, Work]]:
    """Name everything to measure.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        full: Everything, in several calls of under 9 minutes.
        tiny: The smallest sizes, two rounds.
        record: Where the first work, the limits of the device, is by the time the others run.
        budget: What is left of the time, for works that are commands.

    Yields:
        The name of an entry of the record, and what measures it.
    """
    timer = machine.Timer(device, SECONDS, rounds=2 if tiny else None)

    def limits() -> dict[str, Any]:
        return {**machine.peaks(timer, 64 if tiny else 8192), "clocks": machine.clocks(device)}

    def with_limits(measure: Callable[..., dict[str, Any]], *args: Any, **settings: Any) -> dict[str, Any]:
        return measure(*args, timer, record.get("limits"), **settings) | {"clocks": machine.clocks(device)}

    yield "limits", limits
    cases = [TINY] if tiny else [CENTRE, NARROW_FIRST, *(AROUND if full else [])]
    for case in cases:
        for dtype, phase in product(machine.DTYPES, reversed(PHASES)):
            if dtype == torch.float16 and phase != "step" and not full:
                continue
            name = f"{case.name} {phase} {machine.name_of(dtype)}"
            yield name, partial(with_limits, networks.measure, case, phase, dtype, compiled=False)
    curved = TINY if tiny else CURVED
    yield name_of_hessian(curved), partial(with_limits, hessians.measure, curved)
    for count, rows in ((2, 5),) if tiny else (*PRODUCTS, *(NEAR_FEW if full else ())):
        name = f"products of {rows} rows, {count} times, float32"
        yield name, partial(with_limits, grams.measure, count, rows, 4096)
    sizes = convolutions.cases(2, 4) if tiny else convolutions.cases(CENTRE.branches, CENTRE.samples)
    for conv in sizes[: None if full else CONV_TINY if tiny else CONV_QUICK]:
        for dtype in machine.DTYPES if full or tiny else machine.DTYPES[:2]:
            for operator in TRIPLE:
                name = f"{operator} {conv} {machine.name_of(dtype)}"
                yield name, partial(with_limits, convolutions.measure, conv, operator, dtype)
    if full and not tiny:  # compiling the loop takes minutes
        for case, phase in product((CENTRE, NARROW_FIRST), reversed(PHASES)):
            name = f"{case.name} {phase} float32, torch.compile too"
            yield name, partial(with_limits, networks.measure, case, phase, torch.float32, compiled=True)
        if holds_cifar():
            yield CLASSIFIER, partial(train_classifier, budget)


def name_of_hessian(case: NetworkCase) -> str:
    return f"{case.name} Hessian of the first layers float32"


def holds_cifar() -> bool:
    """Whether ``BSFAST_DATA`` or ``./data`` names or holds CIFAR-10."""
    folder = ROOT / (os.environ.get("BSFAST_DATA") or "data")
    entries = folder.iterdir() if folder.is_dir() else ()
    return folder.exists() and any(CIFAR.search(path.name) for path in (folder, *entries))


def train_classifier(budget: Budget) -> dict[str, Any] | None:
    """Time the experiment from its start to its report; None if less time is left than it takes.

    Raises:
        RuntimeError: If it fails, took other data, or trained less than all epochs.
    """
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = run([sys.executable, "-m", "experiments", "classifier", *OPTIONS, "--out", folder], budget)
        seconds = time.perf_counter() - began
        if done is None:
            return None
        if done.returncode or "Data: CIFAR-10" not in done.stdout:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines() or [""]
            raise RuntimeError(f"the classifier must train on CIFAR-10, got status {done.returncode}: {said[-1]}")
        (file,) = Path(folder).glob("*/run.json")
        metrics = json.loads(file.read_text())["metrics"]
    epochs, ended_by = len(metrics["history"]), metrics["ended_by"]
    if (epochs, ended_by) != (EPOCHS, "epochs"):
        raise RuntimeError(f"the classifier must train {EPOCHS} epochs, got {epochs}, ended by {ended_by}")
    return {"seconds": round(seconds, 1), "epochs": epochs, "ended_by": ended_by, "clocks": machine.clocks("cuda")}
