"""Time the fused generators against a loop over them, the contestants taking turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched

_WARM_UP, _REPEATS = 2, 10
_LIMIT = 40.0  # s, after which no further round is begun


def measure_speed(branches: Sequence[nn.Module], x: Tensor, style: Tensor) -> dict[str, Any]:
    """Time a forward pass (no gradients) and a training step: forward, backward, Adam.

    The contestants are the fused network and two loops over the same branches, one with its tensors in PyTorch's
    default memory format and one in channels-last. All start from the same parameters.

    Args:
        branches: M modules that map images and styles to images; left as they are.
        x: Images, float32, shape ``(N, 3, H, W)``.
        style: Shape ``(N, K)``, on the device of x.

    Returns:
        The table that the report shows: for each contestant and column the median and the quartiles, in ms.
    """
    device = x.device
    loop, last = (ReferenceBranched([copy.deepcopy(branch) for branch in branches]) for _ in range(2))
    contestants: dict[str, tuple[nn.Module, Tensor]] = {
        "bsfast.fuse": (bsfast.fuse(list(branches)).to(device), x),
        "loop over branches": (loop.to(device), x),
        "loop, channels last": (
            last.to(device, memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        ),
    }
    optimizers = {name: torch.optim.Adam(net.parameters(), foreach=True) for name, (net, _) in contestants.items()}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contestants}
    started = time.perf_counter()
    for repeat in range(-_WARM_UP, _REPEATS):
        if repeat > 0 and time.perf_counter() - started > _LIMIT:
            break
        for name, (net, own) in contestants.items():
            taken = (
                _time(lambda net=net, own=own: _forward(net, own, style), device),
                _time(lambda net=net, own=own, name=name: _step(net, own, style, optimizers[name]), device),
            )
            if repeat >= 0:
                for column, milliseconds in zip(times[name], taken, strict=True):
                    column.append(milliseconds)
    return {
        "what": f"M={len(branches)} generators, {len(x)} images of {' x '.join(map(str, x.shape[1:]))}, float32, "
        f"{device.type}, {torch.get_num_threads()} threads",
        "unit": "ms",
        "columns": ["Forward", "Training step"],
        "repeats": len(times["bsfast.fuse"][0]),
        "rows": [
            {"contestant": name, "baseline": name.startswith("loop"), "values": [_summary(own) for own in columns]}
            for name, columns in times.items()
        ],
        "note": "A training step is forward, backward and Adam, of the generators alone.",
    }


def _forward(net: nn.Module, x: Tensor, style: Tensor) -> None:
    with torch.no_grad():
        net(x, style)


def _step(net: nn.Module, x: Tensor, style: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    net(x, style).square().mean().backward()
    optimizer.step()


def _time(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def _summary(times: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = np.percentile(times, (25, 50, 75))
    return float(median), float(low), float(high)
