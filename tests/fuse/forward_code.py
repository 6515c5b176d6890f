"""A branch whose forward code is given."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bsfast


class Forward(nn.Module):
    """A linear layer and the forward code under test."""

    def __init__(self, code: Callable[[Any, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("state", torch.zeros(3))
        self.code = code
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def fuse_code(code: Callable[[Any, Tensor], Any], num_branches: int = 2, **attributes: Any) -> bsfast.Branched:
    return bsfast.fuse([Forward(code, **attributes) for _ in range(num_branches)])
