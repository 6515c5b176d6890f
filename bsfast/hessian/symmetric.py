"""Symmetric matrices of all branches as one batched operator: what the methods in lockstep work on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bsfast.hessian.linear_operator import LinearOperator
from bsfast.hessian.operator import HessianOperator


class Batched(NamedTuple):
    """B symmetric matrices of size P x P.

    Attributes:
        product: ``(B, P, K)`` to ``(B, P, K)``.
        size: B and P.
        dtype: Of the elements.
        device: Where they are.
    """

    product: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


def as_batched(H: LinearOperator | Tensor, function: str) -> Batched:
    """See a Hessian or matrices as B symmetric matrices.

    Args:
        H: A block-diagonal :class:`HessianOperator` (B = M, its blocks), any other symmetric operator (B = 1), or
            matrices ``(P, P)`` or ``(B, P, P)``.
        function: Name for errors.

    Returns:
        The operator.

    Raises:
        ValueError: If it is not square, or branches differ in size.
        TypeError: If it is neither operator nor floating-point tensor.
    """
    if isinstance(H, Tensor):
        if not H.is_floating_point():
            raise TypeError(f"{function}: H must be floating-point, got {H.dtype}")
        if H.dim() not in {2, 3} or H.shape[-1] != H.shape[-2]:
            raise ValueError(f"{function}: H must have shape (P, P) or (B, P, P), got {tuple(H.shape)}")
        matrices = H if H.dim() == 3 else H.unsqueeze(0)
        return Batched(matrices.matmul, (matrices.shape[0], matrices.shape[1]), H.dtype, H.device)
    if not isinstance(H, LinearOperator):
        raise TypeError(f"{function}: H must be an operator or a tensor, got {type(H).__name__}")
    if H.shape[0] != H.shape[1]:
        raise ValueError(f"{function}: H must be square, got {H.shape}")
    if isinstance(H, HessianOperator) and H.coupling == "block_diag":
        P = H.parameters.size(function)
        return Batched(H.per_branch, (H.parameters.num_branches, P), H.dtype, H.device)
    return Batched(lambda V: H.columns(V[0]).unsqueeze(0), (1, H.shape[0]), H.dtype, H.device)


def random_normal(batched: Batched, count: int, generator: torch.Generator) -> Tensor:
    """Normal vectors ``(B, P, count)``, different for every branch."""
    shape = (*batched.size, count)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(batched.dtype).to(batched.device)


def random_signs(batched: Batched, count: int, generator: torch.Generator) -> Tensor:
    """Vectors of random signs ``(B, P, count)``, different for every branch."""
    bits = torch.randint(2, (*batched.size, count), generator=generator)
    return (2 * bits - 1).to(batched.dtype).to(batched.device)


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or one with a fixed seed: the global random state is never used."""
    return torch.Generator().manual_seed(0) if generator is None else generator
