"""Branched layers: the M-branch forms of ``torch.nn`` modules."""

from bsfast.nn.layers import (
    BatchNorm,
    Conv2d,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm,
    Linear,
    Pointwise,
    PReLU,
    Samplewise,
)
from bsfast.nn.stacked import StackedModule
from bsfast.nn.vmapped import Vmapped

__all__ = [
    "BatchNorm",
    "Conv2d",
    "GroupNorm",
    "InstanceNorm2d",
    "LayerNorm",
    "Linear",
    "PReLU",
    "Pointwise",
    "Samplewise",
    "StackedModule",
    "Vmapped",
]
