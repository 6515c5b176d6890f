"""Time the fused classifier against a loop over its branches, the contestants taking turns."""

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

_WARM_UP = 2


def measure_speed(
    branches: Sequence[nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
    num_classes: int,
    repeats: int,
    limit: float,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time a forward pass (eval mode, no gradients) and a whole SGD step of each contestant.

    The contestants are the fused network and two loops over the same branches, one with its tensors in PyTorch's
    default memory format and one in channels-last. All start from the same parameters.

    Args:
        branches: M modules that map ``(N, 3, 32, 32)`` to ``(N, C)``; left as they are.
        loss: Maps logits and labels to a scalar.
        batch_size: N.
        num_classes: C.
        repeats: Timed rounds, after two rounds of warm-up.
        limit: Time in s after which no further round is begun; at least one is timed.
        device: Where to run.

    Returns:
        The table that the report shows: for each contestant and column the median and the quartiles, in ms.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(num_classes, (batch_size,), generator=generator).to(device)
    plain, last = ([copy.deepcopy(branch) for branch in branches] for _ in range(2))
    contestants: dict[str, tuple[nn.Module, Tensor]] = {
        "bsfast.fuse": (bsfast.fuse(list(branches)).to(device), x),
        "loop over branches": (ReferenceBranched(plain).to(device), x),
        "loop, channels last": (
            ReferenceBranched(last).to(device, memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        ),
    }
    difference = _largest_difference([net for net, _ in contestants.values()], x)
    optimizers = {
        name: torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        for name, (net, _) in contestants.items()
    }
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contestants}
    started = time.perf_counter()
    for repeat in range(-_WARM_UP, repeats):
        if repeat > 0 and time.perf_counter() - started > limit:
            break
        for name, (net, own_x) in contestants.items():
            net.eval()
            forward = _time(lambda net=net, own_x=own_x: _forward(net, own_x), device)
            net.train()
            step = _time(
                lambda net=net, own_x=own_x, name=name: _step(net, loss, optimizers[name], own_x, labels), device
            )
            if repeat >= 0:
                times[name][0].append(forward)
                times[name][1].append(step)
    rows = [
        {
            "contestant": name,
            "baseline": name.startswith("loop"),
            "values": [_summary(column) for column in times[name]],
        }
        for name in contestants
    ]
    return {
        "what": f"M={len(branches)} branches, {batch_size} images of 3 x 32 x 32, float32, {device}, "
        f"{torch.get_num_threads()} threads",
        "unit": "ms",
        "columns": ["Forward", "Training step"],
        "repeats": len(times["bsfast.fuse"][0]),
        "rows": rows,
        "note": f"Before the first step, the contestants' outputs differ by at most {difference:.1e} of the largest.",
    }


def _largest_difference(nets: Sequence[nn.Module], x: Tensor) -> float:
    outputs = [_forward(net.eval(), x) for net in nets]
    scale = outputs[-1].abs().max()
    return max(((output - outputs[-1]).abs().max() / scale).item() for output in outputs[:-1])


def _forward(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def _step(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss(net(x), labels).backward()
    optimizer.step()


def _time(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def _summary(times: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = np.percentile(times, (25, 50, 75))
    return float(median), float(low), float(high)
