"""Spectral density of every branch's Hessian block by stochastic Lanczos quadrature, in lockstep."""

from typing import NamedTuple

import torch
from torch import Tensor

from bsfast.hessian.lanczos import Krylov
from bsfast.hessian.linear_operator import LinearOperator
from bsfast.hessian.symmetric import as_batched, own_generator, random_normal


class Density(NamedTuple):
    """Densities of B = M spectra.

    Attributes:
        grid: ``(B, G)``, eigenvalues.
        density: ``(B, G)``; its integral over all eigenvalues is 1.
        nodes: ``(B, probes, steps)``, nodes of the quadrature.
        weights: ``(B, probes, steps)``, their weights; those of a probe sum to 1.
    """

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor


def spectral_density(
    H: LinearOperator | Tensor,
    *,
    lanczos_steps: int = 64,
    num_probes: int = 4,
    grid_points: int = 512,
    width: float | None = None,
    generator: torch.Generator | None = None,
) -> Density:
    """Estimate the distribution of the eigenvalues of every branch's block.

    Args:
        H: A block-diagonal :class:`HessianOperator`; any other symmetric operator is one matrix (B = 1); or matrices.
        lanczos_steps: Products a probe; at most P are used.
        num_probes: Random vectors a branch; the estimate is their mean.
        grid_points: G.
        width: Standard deviation of the Gaussians that the nodes are drawn as; by default 1 % of the range of the
            nodes, and no less than makes them wider than the grid is fine.
        generator: Random numbers; by default ones of a fixed seed.

    Returns:
        Densities on a grid that covers all nodes, and the quadrature itself.

    Raises:
        ValueError: If a number is too small.

    Source: Ubaru, Chen & Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.

    Example:
        >>> result = spectral_density(torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0])), num_probes=100)
        >>> in_upper_half = result.density[0] * (result.grid[0] > 0.5)
        >>> round(torch.trapezoid(in_upper_half, result.grid[0]).item(), 1)  # one eigenvalue of four
        0.2
    """  # noqa: DOC502
    counts = {"lanczos_steps": lanczos_steps, "num_probes": num_probes, "grid_points": grid_points - 1}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"spectral_density: {name} must be larger, got {count + (name == 'grid_points')}")
    if width is not None and width <= 0:
        raise ValueError(f"spectral_density: width must be positive, got {width}")
    batched = as_batched(H, "spectral_density")
    generator = own_generator(generator)
    steps = min(lanczos_steps, batched.size[1])
    nodes, weights = [], []
    for _ in range(num_probes):
        start = random_normal(batched, 1, generator).squeeze(2)
        krylov = Krylov(batched, start, steps, generator, restart=False)
        for _ in range(steps):
            krylov.step()
        values, vectors = krylov.ritz()
        nodes.append(values)
        weights.append(vectors[:, 0].square())  # after a breakdown, vectors that the probe has no part in weigh nothing
    all_nodes, all_weights = torch.stack(nodes, 1), torch.stack(weights, 1)
    counted = all_weights > torch.finfo(torch.float64).eps
    low = torch.where(counted, all_nodes, torch.inf).flatten(1).amin(1)
    high = torch.where(counted, all_nodes, -torch.inf).flatten(1).amax(1)
    spread = torch.where(high > low, high - low, high.abs().clamp_min(1.0))
    widths = spread * 0.01 if width is None else torch.full_like(spread, width)
    widths = torch.maximum(widths, 2 * (spread + 8 * widths) / grid_points)
    unit = torch.linspace(0, 1, grid_points, dtype=torch.float64)
    grid = (low - 4 * widths)[:, None] + unit * (high - low + 8 * widths)[:, None]
    distance = (grid[:, None, None] - all_nodes.unsqueeze(3)) / widths[:, None, None, None]
    bells = torch.exp(-distance.square() / 2) / (widths[:, None, None, None] * (2 * torch.pi) ** 0.5)
    density = (bells * all_weights.unsqueeze(3)).sum(2).mean(1)
    return Density(grid, density, all_nodes, all_weights)
