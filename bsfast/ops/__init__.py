"""Operators over M branches; the only place that names ``torch.ops.bsfast``."""

from bsfast.ops.conv2d import conv2d, conv2d_input_grad, conv2d_weight_grad

__all__ = ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"]
