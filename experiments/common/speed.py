"""Time fused branches against loops over them, the contestants taking turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched

_WARM_UP = 2  # rounds


def contestants(branches: Sequence[nn.Module], x: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Make the contestants, which start from the same parameters.

    They are the fused network and two loops over the same branches, one with its tensors in PyTorch's default memory
    format and one in channels-last.

    Args:
        branches: M modules; left as they are.
        x: Images, float32, shape ``(N, 3, H, W)``.

    Returns:
        Networks on the images' device, and the images as each takes them, by name; loops are named so.
    """
    loop, last = (ReferenceBranched([copy.deepcopy(branch) for branch in branches]) for _ in range(2))
    return {
        "bsfast.fuse": (bsfast.fuse(list(branches)).to(x.device), x),
        "loop over branches": (loop.to(x.device), x),
        "loop, channels last": (
            last.to(x.device, memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        ),
    }


def compare(
    nets: dict[str, tuple[nn.Module, Tensor]],
    forward: Callable[[nn.Module, Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    *,
    repeats: int,
    limit: float,
    what: str,
    note: str,
) -> dict[str, Any]:
    """Time a forward pass (eval mode, no gradients) and a whole training step of each contestant.

    Args:
        nets: The contestants, as of :func:`contestants`.
        forward: Maps a network and its images to outputs.
        loss: Maps outputs to a scalar.
        optimizer: Makes the optimiser of some parameters.
        repeats: Timed rounds, after two rounds of warm-up.
        limit: Time in s after which no further round is begun; at least one is timed.
        what: What is timed; the number of threads is added.
        note: What else to know.

    Returns:
        The table that the report shows: for each contestant and column the median and the quartiles, in ms.
    """

    def infer(net: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            forward(net, x)

    def step(net: nn.Module, x: Tensor, own: torch.optim.Optimizer) -> None:
        own.zero_grad(set_to_none=True)
        loss(forward(net, x)).backward()
        own.step()

    optimizers = {name: optimizer(net.parameters()) for name, (net, _) in nets.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in nets}
    started = time.perf_counter()
    for repeat in range(-_WARM_UP, repeats):
        if repeat > 0 and time.perf_counter() - started > limit:
            break
        for name, (net, x) in nets.items():
            net.eval()
            first = _milliseconds(infer, net, x)
            net.train()
            taken = first, _milliseconds(step, net, x, optimizers[name])
            if repeat >= 0:
                rounds[name].append(taken)
    return {
        "what": f"{what}, {torch.get_num_threads()} threads",
        "unit": "ms",
        "columns": ["Forward", "Training step"],
        "repeats": len(rounds["bsfast.fuse"]),
        "rows": [
            {"contestant": name, "baseline": name.startswith("loop"), "values": _quartiles(taken)}
            for name, taken in rounds.items()
        ],
        "note": note,
    }


def _milliseconds(work: Callable[..., None], net: nn.Module, x: Tensor, *more: Any) -> float:
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    work(net, x, *more)
    wait()
    return 1e3 * (time.perf_counter() - started)


def _quartiles(rounds: Sequence[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """Median, lower and upper quartile of each column."""
    low, median, high = np.percentile(rounds, (25, 50, 75), axis=0).tolist()
    return list(zip(median, low, high, strict=True))
