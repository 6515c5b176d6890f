"""Exponential moving average of a network's parameters."""

from __future__ import annotations

import torch
from torch import nn


def update_average(average: nn.Module, module: nn.Module, *, decay: float, step: int) -> None:
    """Move an average a bit towards the current parameters; buffers are copied.

    The decay is ``min(decay, (1 + step) / (10 + step))``, so that a short training is not dominated by its start.

    Args:
        average: Changed in place.
        module: Of the same architecture.
        decay: Weight of the old average, below 1.
        step: Steps taken before this one.
    """
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        for old, new in zip(average.buffers(), module.buffers(), strict=True):
            old.copy_(new)
