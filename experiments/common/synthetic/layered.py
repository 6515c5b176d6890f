"""Images that are exact sums of layers: painted back to front, each layer is what it changed, in whole grey levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayeredImages:
    """Images with the layers they are made of.

    Attributes:
        images: Pixels, uint8, shape ``(N, 3, H, W)``: the sum of the layers, exactly.
        layers: What each layer added, in the images' grey levels, int16, shape ``(N, L, 3, H, W)``.
        masks: Where each layer's object is, bool, shape ``(N, L, H, W)``.
        labels: Index into ``classes``, int64, shape ``(N,)``.
        names: Names of the layers, back to front.
        classes: Names of the classes.
    """

    images: Tensor
    layers: Tensor
    masks: Tensor
    labels: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]

    def mask(self, name: str) -> Tensor:
        """Where one layer's object is, bool, shape ``(N, H, W)``."""
        return self.masks[:, self.names.index(name)]

    def signals(self) -> Tensor:
        """Layers in the units of networks, float32, shape ``(N, L, 3, H, W)``; they sum to the image in -1 to 1."""
        signals = self.layers.float() * (2 / 255)
        signals[:, 0] -= 1
        return signals


@dataclass
class Canvas:
    """An image in progress, in 0 to 1, and the layers painted so far.

    Attributes:
        omit: Names of layers that leave the image as it is.
        image: Shape ``(N, 3, H, W)``.
    """

    omit: frozenset[str]
    image: Tensor | None = None
    _levels: list[Tensor] = field(default_factory=list)
    _masks: list[Tensor] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)

    def paint(self, name: str, change: Callable[[Tensor], Tensor] | Tensor, mask: Tensor) -> None:
        """Add a layer.

        Args:
            name: Its name.
            change: Maps the image before to the image after, within 0 to 1; of the first layer, the image itself.
            mask: Coverage of the layer's object, in 0 to 1, shape ``(N, H, W)``.

        Raises:
            ValueError: If the image leaves 0 to 1.
        """
        if isinstance(change, Tensor):
            image = change
        elif name in self.omit:
            image = self.image
        else:
            image = change(self.image)
        low, high = image.min().item(), image.max().item()
        if not (low >= -1e-5 and high <= 1 + 1e-5):
            raise ValueError(f"Canvas.paint: layer {name} must keep the image in 0 to 1, got {low:.4g} to {high:.4g}")
        self.image = image
        self._names.append(name)
        self._levels.append((image * 255).round().to(torch.int16))
        self._masks.append(mask.expand(len(image), *image.shape[2:]) > 0.5)

    def finish(self, labels: Tensor, classes: tuple[str, ...]) -> LayeredImages:
        """Take the layers off the canvas."""
        levels = torch.stack(self._levels, dim=1)
        layers = levels.diff(dim=1, prepend=torch.zeros_like(levels[:, :1]))
        masks = torch.stack(self._masks, dim=1)
        return LayeredImages(levels[:, -1].to(torch.uint8), layers, masks, labels, tuple(self._names), classes)


def over(image: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
    """Cover an image ``(N, 3, H, W)`` by a colour, one or of every pixel, as far as alpha ``(N, H, W)``."""
    return image + alpha[:, None] * (colour - image)


def contrast(image: Tensor, amount: Tensor) -> Tensor:
    """Brighten where the amount ``(N, H, W)`` is above 0 and darken where below; -1 to 1 keeps 0 to 1 in itself."""
    return image + amount[:, None].clamp(-1, 1) * image * (1 - image)


def screen(image: Tensor, light: Tensor) -> Tensor:
    """Add white light ``(N, H, W)`` in 0 to 1 as a second slide projector would."""
    return image + light[:, None].clamp(0, 1) * (1 - image)


def multiply(image: Tensor, shade: Tensor) -> Tensor:
    """Scale by a shade ``(N, H, W)`` in 0 to 1."""
    return image * shade[:, None].clamp(0, 1)


def by_class(labels: Tensor, *values: float) -> Tensor:
    """The value of each image's class, shape ``(N, 1, 1)``."""
    return torch.tensor(values)[labels].view(-1, 1, 1)


def colours(table: Sequence[Sequence[float]], choice: Tensor, jitter: Sequence[Tensor]) -> Tensor:
    """Look up colours by a number in 0 to 1, ``(N, 1, 1)``, and change each channel a bit; shape ``(N, 3, 1, 1)``."""
    rows = torch.tensor(table)
    own = rows[(choice.flatten() * len(rows)).long().clamp(max=len(rows) - 1)]
    return (own + torch.cat([part.view(-1, 1) for part in jitter], dim=1)).clamp(0.02, 0.98)[:, :, None, None]
