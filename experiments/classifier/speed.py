"""Time the fused classifier against a loop over its branches, the contestants taking turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common.speed import compare, contestants


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
    nets = contestants(branches, x)
    difference = _largest_difference([net for net, _ in nets.values()], x)
    return compare(
        nets,
        lambda net, x: net(x),
        lambda logits: loss(logits, labels),
        functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        repeats=repeats,
        limit=limit,
        what=f"M={len(branches)} branches, {batch_size} images of 3 x 32 x 32, float32, {device}",
        note=f"Before the first step, the contestants' outputs differ by at most {difference:.1e} of the largest.",
    )


def _largest_difference(nets: Sequence[nn.Module], x: Tensor) -> float:
    with torch.no_grad():
        outputs = [net.eval()(x) for net in nets]
    scale = outputs[-1].abs().max()
    return max(((output - outputs[-1]).abs().max() / scale).item() for output in outputs[:-1])
