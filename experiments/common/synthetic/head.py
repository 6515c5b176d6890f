"""The frame of a head, in which animals and faces are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from experiments.common.synthetic.layered import by_class
from experiments.common.synthetic.raster import coverage


@dataclass
class Head:
    """Geometry that layers share, in the head's own frame: u to the right, v down, mirrored features at abs(u)."""

    labels: Tensor
    size: int
    u: Tensor
    v: Tensor
    turn: Tensor  # of the face to the side; features shift by their depth times it

    def of_class(self, *values: float) -> Tensor:
        """The value of each image's class, shape ``(N, 1, 1)``."""
        return by_class(self.labels, *values)

    def covers(self, distance: Tensor, softness: float = 0.0) -> Tensor:
        """Share of each pixel that is inside, from the signed distance."""
        return coverage(distance, self.size, softness)

    def at_depth(self, depth: float) -> Tensor:
        """Horizontal coordinate of features that stick out by a depth."""
        return self.u - self.turn * depth
