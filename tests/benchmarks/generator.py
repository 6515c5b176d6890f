"""A residual image-to-image generator steered by a style, in plain ``torch.nn``: the paper's class-transfer network.

Source: Choi et al. (2020), StarGAN v2, arXiv 1912.01865; without its high-pass skips, and with few channels.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

ACTIVATION = nn.LeakyReLU(0.2)


class AdaIN(nn.Module):
    """Instance normalisation whose scale and shift a style gives."""

    def __init__(self, channels: int, style_size: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels)
        self.scale = nn.Linear(style_size, channels)
        self.shift = nn.Linear(style_size, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return (1 + self.scale(style)[:, :, None, None]) * self.norm(x) + self.shift(style)[:, :, None, None]


class EncoderBlock(nn.Module):
    """Two 3 x 3 convolutions after instance normalisation, added to a shortcut; halves the image if asked to."""

    def __init__(self, in_channels: int, out_channels: int, *, down: bool) -> None:
        super().__init__()
        self.norm1 = nn.InstanceNorm2d(in_channels, affine=True)
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(in_channels, affine=True)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = _shortcut(in_channels, out_channels)
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        self.activation = ACTIVATION

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.conv1(self.activation(self.norm1(x))))
        y = self.conv2(self.activation(self.norm2(y)))
        return (y + self.pool(self.shortcut(x))) / math.sqrt(2)


class DecoderBlock(nn.Module):
    """Two 3 x 3 convolutions after :class:`AdaIN`, added to a shortcut; doubles the image if asked to."""

    def __init__(self, in_channels: int, out_channels: int, style_size: int, *, up: bool) -> None:
        super().__init__()
        self.norm1 = AdaIN(in_channels, style_size)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = AdaIN(out_channels, style_size)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = _shortcut(in_channels, out_channels)
        self.up = nn.Upsample(scale_factor=2, mode="nearest") if up else nn.Identity()
        self.activation = ACTIVATION

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = self.conv1(self.up(self.activation(self.norm1(x, style))))
        y = self.conv2(self.activation(self.norm2(y, style)))
        return (y + self.shortcut(self.up(x))) / math.sqrt(2)


class Generator(nn.Module):
    """Map images ``(N, 3, H, W)`` and styles ``(N, style_size)`` to images ``(N, 3, H, W)``.

    ``widths`` are the channels at the full size, at half of it, and so on down to the inner blocks, two a side.
    """

    def __init__(self, widths: Sequence[int], style_size: int) -> None:
        super().__init__()
        steps = list(pairwise(widths))
        inner = widths[-1]
        self.from_rgb = nn.Conv2d(3, widths[0], 3, padding=1)
        self.encoder = nn.Sequential(
            *(EncoderBlock(wide, narrow, down=True) for wide, narrow in steps),
            *(EncoderBlock(inner, inner, down=False) for _ in range(2)),
        )
        self.decoder = nn.ModuleList(
            [DecoderBlock(inner, inner, style_size, up=False) for _ in range(2)]
            + [DecoderBlock(narrow, wide, style_size, up=True) for wide, narrow in reversed(steps)]
        )
        self.norm = nn.InstanceNorm2d(widths[0], affine=True)
        self.activation = ACTIVATION
        self.to_rgb = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = self.encoder(self.from_rgb(x))
        for block in self.decoder:
            y = block(y, style)
        return self.to_rgb(self.activation(self.norm(y)))


def _shortcut(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, bias=False)
