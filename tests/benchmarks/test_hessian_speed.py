"""Speed, error and memory of Hessians next to stock PyTorch, code by hand and other libraries.

``make bench-full`` only. The case is the paper's classifier, M=16, N=128, widths 8, 16, 32, 32, in evaluation mode,
with cross-entropy, float32; each contestant is measured in a process of its own with the tuned allocator.

- matrix: the whole Hessian in the weights of all first layers, 3456 x 3456.
- columns: those who make the matrix column by column are timed for one column; the record says how many there are.
- products: one product of the block-diagonal Hessian in all 1.3e6 parameters.
- eigenvalues: the five largest of every branch, in all its parameters, to 1e-3.

curvlinops (3.0.1) and BackPACK (1.7.1) are compared where they are installed; what curvlinops would take in the matrix
is one column times 3456. On a machine that other processes use, the test skips and records nothing.
"""

import json
import os
import subprocess
import sys
from datetime import datetime, timezone

import pytest

from bsfast.ops.backend import native_why_not
from experiments.common.atomic import write_atomically
from tests.benchmarks.hessian_contestants import EIGENVALUES, MATRICES, PRODUCTS, SINGLE_COLUMNS
from tests.benchmarks.measure_hessian import SAME
from tests.benchmarks.network_case import NetworkCase
from tests.benchmarks.network_record import PATH as NETWORKS
from tests.benchmarks.network_record import ROOT, environment_of

WHY_NOT = native_why_not("cpu")
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no own CPU kernels: {WHY_NOT}"),
    pytest.mark.full,
]
PATH = NETWORKS.with_name("hessian.json")
CENTRE = NetworkCase()
WORKS = {"matrix": MATRICES, "columns": SINGLE_COLUMNS, "products": PRODUCTS, "eigenvalues": EIGENVALUES}


@pytest.mark.parametrize(("work", "name"), [(work, name) for work, names in WORKS.items() for name in names])
def test_hessian_speed(benchmark, capsys, work, name):
    rounds = 1 if work in {"columns", "eigenvalues"} else 3
    order = {"case": CENTRE._asdict(), "work": work, "name": name, "rounds": rounds}
    result = benchmark.pedantic(measure_apart, (order,), rounds=1)
    assert result.get("error", 0) < SAME
    if result["busy"]:
        pytest.skip(result["busy"])
    save(work, name, result)
    with capsys.disabled():
        figures = f"{result['median_s']} s, {result['peak_mib']} MiB, FMA peak {result['fma_peak_gflops']} GFLOP/s"
        print(f"\n{work}: {name}: {figures}")  # noqa: T201


def measure_apart(order):
    """Run :mod:`tests.benchmarks.measure_hessian` and return what it measured."""
    command = [sys.executable, "-m", "tests.benchmarks.measure_hessian", json.dumps(order)]
    environment = {**environment_of("tuned"), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measure_hessian: {order} must succeed, got:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def save(work, name, result):
    """Put one measurement into the record; those of another host are dropped."""
    record = json.loads(PATH.read_text()) if PATH.exists() else {"host": {}, "works": {}}
    host = result.pop("host")
    if record["host"] != host:
        record = {"host": host, "works": {}}
    entry = {"date": datetime.now(timezone.utc).date().isoformat(), **result}
    record["works"].setdefault(work, {})[name] = entry
    PATH.parent.mkdir(exist_ok=True)
    write_atomically(PATH, (json.dumps(record, indent=1) + "\n").encode())
