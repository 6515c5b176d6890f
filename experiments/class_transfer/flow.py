r"""Split an image exactly by a flow that smooths it: bands of decreasing fineness, and what remains.

The continuous form is :math:`u_t = -p(u)`, :math:`\phi(t) = t\,u_{tt}`, :math:`R = u(T) + T\,p(u(T))`: the bands'
integral and R make the image for every p. It is spectral total variation with any velocity.

Source: arXiv 2206.05810, equations 16 and 17; Gilboa (2014), A total variation spectral framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor], Tensor]


class Bands(NamedTuple):
    """An image in parts: it is ``R + phi.sum(0)``, to rounding.

    Attributes:
        R: What remains, shape ``(N, C, H, W)``.
        phi: Bands from fine to coarse, shape ``(M, N, C, H, W)``.
    """

    R: Tensor
    phi: Tensor


def split_by_flow(x: Tensor, velocity: Velocity, *, steps: int, time: float) -> Bands:
    r"""Split an image by explicit steps of :math:`u_t = -p(u)`.

    With :math:`d_n = p(u_n)` and :math:`u_{n+1} = u_n - h\,d_n`, the bands are :math:`\phi_k = k\,h\,(d_{k-1} - d_k)`,
    a second difference times the time, and :math:`R = u_M + M\,h\,d_M`. Summation by parts gives
    :math:`\sum_k \phi_k + R = x` for every p, linear or not, and also where p changes from step to step.

    Args:
        x: Shape ``(N, C, H, W)``.
        velocity: p, called ``steps + 1`` times; its result has the shape of x and is taken in x's dtype.
        steps: Number of bands M, at least 1.
        time: T; a step is h = T / M.

    Returns:
        R and the bands.

    Raises:
        ValueError: If there is no step or the time is not above 0.
    """
    if steps < 1 or not time > 0:
        raise ValueError(f"split_by_flow: steps must be at least 1 and time above 0, got {steps} and {time}")
    h = time / steps
    u, slope = x, velocity(x).to(x.dtype)
    bands = []
    for k in range(1, steps + 1):
        u = u - h * slope
        after = velocity(u).to(x.dtype)
        bands.append(k * h * (slope - after))
        slope = after
    return Bands(u + time * slope, torch.stack(bands))
