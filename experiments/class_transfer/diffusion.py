"""The learnt nonlinear diffusion: a small network as the velocity of a flow, trained with the generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.class_transfer.flow import Bands, split_by_flow

_SLOPE = 0.2
_START = 0.1  # of the last layer: at the start R is nearly the image and no step can blow up


class SpatialBottleneck(nn.Sequential):
    """Velocity p: 8 convolutions 3 x 3 without bias, through a quarter of the resolution; 40,464 parameters.

    Positively homogeneous of degree 1: p(c u) = c p(u) for c > 0, hence so are R and the bands.
    """

    WIDTHS = (3, 8, 12, 28, 64, 28, 12, 8, 3)

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for index, (wide, narrow) in enumerate(zip(self.WIDTHS[:-1], self.WIDTHS[1:], strict=True)):
            if index in {5, 6}:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers.append(nn.Conv2d(wide, narrow, 3, stride=2 if index in {1, 2} else 1, padding=1, bias=False))
            layers.append(nn.LeakyReLU(_SLOPE))
        super().__init__(*layers[:-1])
        _initialise(self)


class ChannelBottleneck(nn.Sequential):
    """Velocity p: 8 convolutions 3 x 3 with bias, through 8 channels at full resolution; 40,539 parameters."""

    WIDTHS = (3, 64, 24, 16, 8, 16, 24, 64, 3)

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for wide, narrow in zip(self.WIDTHS[:-1], self.WIDTHS[1:], strict=True):
            layers += [nn.Conv2d(wide, narrow, 3, padding=1), nn.LeakyReLU(_SLOPE)]
        super().__init__(*layers[:-1])
        _initialise(self)


VELOCITIES: dict[str, Callable[[], nn.Module]] = {"spatial": SpatialBottleneck, "channel": ChannelBottleneck}


class LearntDiffusion(nn.Module):
    """Smoother whose velocity is a network, the same at every step.

    Args:
        velocity: Name of the network, a key of :data:`VELOCITIES`.
        steps: Number of bands.

    Raises:
        ValueError: If there is no such network.
    """

    splits = True

    def __init__(self, velocity: str, steps: int) -> None:
        super().__init__()
        if velocity not in VELOCITIES:
            raise ValueError(f"LearntDiffusion: velocity must be one of {', '.join(VELOCITIES)}, got {velocity!r}")
        self.velocity = VELOCITIES[velocity]()
        self.steps = steps

    def forward(self, x: Tensor) -> Bands:
        """Split images ``(N, 3, H, W)``; the sums are taken in x's dtype, also under autocast.

        H and W are multiples of 4.
        """
        # The time is part of the network's scale.
        return split_by_flow(x, self.velocity, steps=self.steps, time=1.0)


def _initialise(velocity: nn.Sequential) -> None:
    convolutions = [layer for layer in velocity if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        nn.init.kaiming_normal_(layer.weight, _SLOPE)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        convolutions[-1].weight.mul_(_START)
