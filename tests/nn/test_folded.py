"""Where a convolution and its normalisation may be folded into one affine map."""

import torch

from bsfast.nn import Conv2d
from bsfast.nn.folded import folds_exactly


def test_layers_fold_where_nothing_is_rounded_to_16_bits():
    conv = Conv2d.from_branches([torch.nn.Conv2d(2, 3, 1) for _ in range(2)])
    assert folds_exactly(conv)
    assert folds_exactly(conv.double())
    with torch.autocast(conv.weight.device.type, torch.bfloat16):
        assert folds_exactly(conv)  # autocast leaves float64 alone
        assert not folds_exactly(conv.float())
    assert not folds_exactly(conv.bfloat16())
