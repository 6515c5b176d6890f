"""Time the fused generators against a loop over them, the contestants taking turns."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common.speed import compare, contestants

_REPEATS = 10
_LIMIT = 40.0  # s, after which no further round is begun


def measure_speed(branches: Sequence[nn.Module], x: Tensor, style: Tensor) -> dict[str, Any]:
    """Time a forward pass (no gradients) and a training step: forward, backward, Adam.

    Args:
        branches: M modules that map images and styles to images; left as they are.
        x: Images, float32, shape ``(N, 3, H, W)``.
        style: Shape ``(N, K)``, on the device of x.

    Returns:
        The table that the report shows: for each contestant and column the median and the quartiles, in ms.
    """
    return compare(
        contestants(branches, x),
        lambda net, x: net(x, style),
        lambda outputs: outputs.square().mean(),
        functools.partial(torch.optim.Adam, foreach=True),
        repeats=_REPEATS,
        limit=_LIMIT,
        what=f"M={len(branches)} generators, {len(x)} images of {' x '.join(map(str, x.shape[1:]))}, float32, "
        f"{x.device.type}",
        note="A training step is forward, backward and Adam, of the generators alone.",
    )


def speedups(table: dict[str, Any]) -> dict[str, float]:
    """Time of the faster loop over that of the fused generators, by column of :func:`measure_speed`'s table."""
    fused, *loops = ([value[0] for value in row["values"]] for row in table["rows"])
    return {column: min(loop[at] for loop in loops) / fused[at] for at, column in enumerate(table["columns"])}
