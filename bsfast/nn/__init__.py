"""Branched layers: the M-branch forms of ``torch.nn`` modules."""

from bsfast.nn.layers import (
    BatchNorm,
    Conv2d,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    FeatureAlphaDropout,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm,
    Linear,
    PReLU,
    copy_first,
)
from bsfast.nn.stacked import StackedModule
from bsfast.nn.vmapped import Vmapped

__all__ = [
    "BatchNorm",
    "Conv2d",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "GroupNorm",
    "InstanceNorm2d",
    "LayerNorm",
    "Linear",
    "PReLU",
    "StackedModule",
    "Vmapped",
    "copy_first",
]
