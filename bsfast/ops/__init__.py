"""Operators over M branches; the only place that names ``torch.ops.bsfast``."""

from bsfast.ops.batch_norm import batch_norm, plan_batch_norm
from bsfast.ops.conv2d import conv2d, conv2d_input_grad, conv2d_weight_grad

__all__ = ["batch_norm", "conv2d", "conv2d_input_grad", "conv2d_weight_grad", "plan_batch_norm"]
