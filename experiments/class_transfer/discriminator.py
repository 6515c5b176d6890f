"""The discriminator: StarGAN v2's, one logit a class."""

from __future__ import annotations

import math

from torch import Tensor, nn

from experiments.class_transfer.generator import ResBlock, initialise

WIDTHS: dict[int, tuple[int, int]] = {32: (16, 128), 64: (32, 256), 128: (32, 256), 256: (32, 256)}
SMALLEST = (8, 64)  # at 32 pixels, for machines without an accelerator
_LAST = 4  # pixels


class Discriminator(nn.Module):
    """Residual blocks down to 4 x 4 pixels, then a convolution over all of them.

    Args:
        image_size: Height and width of the images, a power of 2 from 8.
        num_classes: Number of logits.
        base: Channels at full resolution; they double with each halving of the image.
        most: Channels at most.

    Source: Choi et al. (2020), StarGAN v2, arXiv 1912.01865.

    Example:
        >>> sum(parameter.numel() for parameter in Discriminator(256, 3, 64, 512).parameters())
        20852803
    """

    def __init__(self, image_size: int, num_classes: int, base: int, most: int) -> None:
        super().__init__()
        halvings = int(math.log2(image_size // _LAST))
        widths = [min(base * 2**level, most) for level in range(halvings + 1)]
        self.layers = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1),
            *(ResBlock(widths[level], widths[level + 1], down=True, norm=False) for level in range(halvings)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(widths[-1], widths[-1], _LAST),
            nn.LeakyReLU(0.2),
            nn.Conv2d(widths[-1], num_classes, 1),
            nn.Flatten(),
        )
        initialise(self)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Judge images as members of classes.

        Args:
            images: Shape ``(N, 3, H, W)``.
            labels: Class of each, int64, shape ``(N,)``.

        Returns:
            Logits that the image is a real one of its class, shape ``(N,)``.
        """
        return self.layers(images).gather(1, labels[:, None])[:, 0]
