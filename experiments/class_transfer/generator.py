"""The generator's branch: StarGAN v2's generator with few channels, in plain ``torch.nn``.

Source: Choi et al. (2020), StarGAN v2, arXiv 1912.01865, its architecture without the high-pass skips; the style is the
target class itself, one-hot, so that every parameter belongs to one branch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Height and width of images to channels at that resolution and at most: (base, most).
WIDTHS: dict[int, tuple[int, int]] = {32: (8, 32), 64: (8, 64), 128: (16, 128), 256: (16, 128)}
SMALLEST = (4, 16)  # at 32 pixels, for machines without an accelerator
_BOTTLENECK = 16  # pixels
_SLOPE = 0.2


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions, each after instance normalisation, added to a shortcut; halves the image if ``down``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        down: Whether height and width are halved.
        norm: Whether there is instance normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, *, down: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.InstanceNorm2d(in_channels, affine=True) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(in_channels, affine=True) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.activation = nn.LeakyReLU(_SLOPE)
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        widens = in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False) if widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H, W)``, or to half the size."""
        y = self.pool(self.conv1(self.activation(self.norm1(x))))
        y = self.conv2(self.activation(self.norm2(y)))
        # A 1 x 1 convolution and the mean of four pixels commute: at the lower resolution it costs a quarter.
        return (y + self.shortcut(self.pool(x))) * math.sqrt(0.5)


class AdaptiveInstanceNorm(nn.Module):
    """Instance normalisation whose scale and shift are linear in the style.

    Args:
        style_dim: Length of the style.
        channels: Channels of the image.
    """

    def __init__(self, style_dim: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels)
        self.linear = nn.Linear(style_dim, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` and ``(N, style_dim)`` to ``(N, C, H, W)``."""
        gamma, beta = self.linear(style)[:, :, None, None].chunk(2, dim=1)
        return (1 + gamma) * self.norm(x) + beta


class AdaptiveResBlock(nn.Module):
    """Two 3 x 3 convolutions, each after adaptive instance normalisation, added to a shortcut; may double the image.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        style_dim: Length of the style.
        up: Whether height and width are doubled, by nearest neighbour.
    """

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, *, up: bool = False) -> None:
        super().__init__()
        self.norm1 = AdaptiveInstanceNorm(style_dim, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = AdaptiveInstanceNorm(style_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.activation = nn.LeakyReLU(_SLOPE)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest") if up else nn.Identity()
        widens = in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False) if widens else nn.Identity()

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` and ``(N, style_dim)`` to ``(N, C_out, H, W)``, or to twice the size."""
        y = self.conv1(self.upsample(self.activation(self.norm1(x, style))))
        y = self.conv2(self.activation(self.norm2(y, style)))
        # Nearest neighbour commutes with a 1 x 1 convolution.
        return (y + self.upsample(self.shortcut(x))) * math.sqrt(0.5)


class Generator(nn.Module):
    """One branch: down to 16 x 16 pixels and up again, without an activation at the end.

    Args:
        image_size: Height and width of the images, a power of 2 from 16.
        style_dim: Length of the style.
        base: Channels at full resolution; they double with each halving of the image.
        most: Channels at most.
    """

    def __init__(self, image_size: int, style_dim: int, base: int, most: int) -> None:
        super().__init__()
        halvings = int(math.log2(image_size // _BOTTLENECK))
        widths = [min(base * 2**level, most) for level in range(halvings + 1)]
        self.from_rgb = nn.Conv2d(3, widths[0], 3, padding=1)
        encoder = [ResBlock(widths[level], widths[level + 1], down=True) for level in range(halvings)]
        self.encoder = nn.Sequential(*encoder, *(ResBlock(widths[-1], widths[-1]) for _ in range(2)))
        decoder = [AdaptiveResBlock(widths[-1], widths[-1], style_dim) for _ in range(2)]
        for level in reversed(range(halvings)):
            decoder.append(AdaptiveResBlock(widths[level + 1], widths[level], style_dim, up=True))
        self.decoder = nn.ModuleList(decoder)
        self.to_rgb = nn.Sequential(
            nn.InstanceNorm2d(widths[0], affine=True), nn.LeakyReLU(_SLOPE), nn.Conv2d(widths[0], 3, 1)
        )

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` and styles ``(N, style_dim)`` to images ``(N, 3, H, W)``."""
        y = self.encoder(self.from_rgb(x))
        for block in self.decoder:
            y = block(y, style)
        return self.to_rgb(y)


def make_branch(
    image_size: int, num_classes: int, widths: tuple[int, int] | None = None, output_scale: float = 1.0
) -> Generator:
    """Make one branch: He's initialisation, no bias, and no influence of the style at the start.

    Args:
        image_size: Height and width of the images.
        num_classes: Number of classes; the style is one-hot.
        widths: Channels at full resolution and at most; by default those of :data:`WIDTHS`.
        output_scale: Factor on the last convolution's initial weights.

    Returns:
        A new module.

    Raises:
        ValueError: If the size is not a power of 2 from 32, or a number is below 1.

    Example:
        >>> sum(parameter.numel() for parameter in make_branch(64, 3).parameters())
        94883
    """
    if image_size < 32 or image_size & (image_size - 1):
        raise ValueError(f"make_branch: image_size must be a power of 2 from 32, got {image_size}")
    if widths is None and image_size not in WIDTHS:
        raise ValueError(f"make_branch: widths must be given for images of {image_size} pixels, got None")
    base, most = widths or WIDTHS[image_size]
    if not 1 <= base <= most or num_classes < 1:
        raise ValueError(
            f"make_branch: widths must be 1 <= base <= most and num_classes at least 1, got {base}, {most} and "
            f"{num_classes}"
        )
    branch = Generator(image_size, num_classes, base, most)
    initialise(branch)
    with torch.no_grad():
        branch.to_rgb[-1].weight.mul_(output_scale)
        for layer in branch.modules():
            if isinstance(layer, AdaptiveInstanceNorm):
                layer.linear.weight.zero_()
    return branch


def initialise(module: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers as He et al. (2015) do, by fan-in; set their biases to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
