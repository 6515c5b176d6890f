"""Operators over M branches; the only place that names ``torch.ops.bsfast``."""

from bsfast.ops.batch_norm import batch_norm, plan_batch_norm, statistics_dtype
from bsfast.ops.bilinear import taken_dtype
from bsfast.ops.conv2d import conv2d, conv2d_input_grad, conv2d_weight_grad
from bsfast.ops.conv2d_kernels import output_shape
from bsfast.ops.conv2d_sample_grad import conv2d_weight_grad_per_sample
from bsfast.ops.functorch import has_memory
from bsfast.ops.gram import gram, plan_gram
from bsfast.ops.memory_order import to_batch_last
from bsfast.ops.norm_conv2d import (
    Norm,
    folded_conv2d,
    folded_input_grad,
    folded_weight_grad,
    norm_conv2d,
    plan_norm_conv2d,
)
from bsfast.ops.plan import set_winograd_tile
from bsfast.ops.sample_norm import plan_sample_norm, sample_norm

__all__ = [
    "Norm",
    "batch_norm",
    "conv2d",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "conv2d_weight_grad_per_sample",
    "folded_conv2d",
    "folded_input_grad",
    "folded_weight_grad",
    "gram",
    "has_memory",
    "norm_conv2d",
    "output_shape",
    "plan_batch_norm",
    "plan_gram",
    "plan_norm_conv2d",
    "plan_sample_norm",
    "sample_norm",
    "set_winograd_tile",
    "statistics_dtype",
    "taken_dtype",
    "to_batch_last",
]
