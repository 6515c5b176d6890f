"""Trace and diagonal of every branch's Hessian block: exact where theory allows, else estimated with standard errors.

Where the branches are piecewise linear in each parameter by itself, the diagonal of the whole Hessian is that of its
Gauss-Newton term, which the columns of :mod:`bsfast.hessian.jacobian` give in as many passes as the loss has classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bsfast.hessian.jacobian import CHUNK, NoRootError, chunks
from bsfast.hessian.linear_operator import LinearOperator
from bsfast.hessian.operator import HessianOperator
from bsfast.hessian.structure import structure_of
from bsfast.hessian.symmetric import Batched, as_batched, own_generator, random_signs


class Estimate(NamedTuple):
    """A number or a vector for each of B = M branches.

    Attributes:
        value: ``(B,)`` for a trace, ``(B, P)`` for a diagonal.
        stderr: Standard error of each, zero if exact.
        exact: Whether there is no statistical error.
        method: ``"ggn"``, ``"unit_vectors"``, ``"hutchinson"`` or ``"xdiag"``.
        why: The reason for the method.
    """

    value: Tensor
    stderr: Tensor
    exact: bool
    method: str
    why: str


def trace(
    H: LinearOperator | Tensor,
    *,
    method: str = "auto",
    num_matvecs: int = 100,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Trace of every branch's block.

    Args:
        H: A block-diagonal :class:`HessianOperator`; any other symmetric operator is one matrix (B = 1); or matrices.
        method: ``"auto"``: exact if the net allows it, or if P is at most ``num_matvecs``; else ``"hutchinson"``.
        num_matvecs: Number of random vectors.
        generator: Random numbers; by default ones of a fixed seed.

    Returns:
        One number a branch.

    Raises:
        ValueError: If the method is unknown.

    Source: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.

    Example:
        >>> import bsfast
        >>> from torch import nn
        >>> net = bsfast.fuse(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), num_branches=5)
        >>> data = torch.randn(7, 3), torch.randint(2, (7,))
        >>> H = HessianOperator(net, nn.CrossEntropyLoss(), data, coupling="block_diag")
        >>> result = trace(H)
        >>> result.value.shape, result.exact, result.method
        (torch.Size([5]), True, 'ggn')
    """  # noqa: DOC502
    if method not in {"auto", "hutchinson"}:
        raise ValueError(f"trace: method must be 'auto' or 'hutchinson', got {method!r}")
    exact, why = _exact(H, num_matvecs, "trace") if method == "auto" else (None, "asked for")
    if exact is not None:
        total = exact.value.sum(1)
        return exact._replace(value=total, stderr=torch.zeros_like(total))
    _check_count(num_matvecs, "trace")
    batched = as_batched(H, "trace")
    generator = own_generator(generator)
    samples = []
    for count in _portions(num_matvecs):
        signs = random_signs(batched, count, generator)
        samples.append((signs * batched.product(signs)).sum(1))
    values = torch.cat(samples, 1)  # (B, num_matvecs)
    return Estimate(values.mean(1), values.std(1) / num_matvecs**0.5, False, "hutchinson", why)


def diagonal(
    H: LinearOperator | Tensor,
    *,
    method: str = "auto",
    num_matvecs: int = 100,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Diagonal of every branch's block.

    Args:
        H: As for :func:`trace`.
        method: ``"auto"``: exact if the net allows it, or if P is at most ``num_matvecs``; else ``"xdiag"``, or
            ``"hutchinson"``.
        num_matvecs: Number of products.
        generator: Random numbers; by default ones of a fixed seed.

    Returns:
        One vector a branch.

    Raises:
        ValueError: If the method is unknown.

    Source: Bekas, Kokiopoulou & Saad (2007); Epperly, Tropp & Webber (2024), XTrace: making the most of every sample.

    Example:
        >>> import bsfast
        >>> from torch import nn
        >>> net = bsfast.fuse(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), num_branches=5)
        >>> data = torch.randn(7, 3), torch.randint(2, (7,))
        >>> H = HessianOperator(net, nn.CrossEntropyLoss(), data, coupling="block_diag")
        >>> diagonal(H).value.shape, diagonal(H, method="xdiag", num_matvecs=10).exact
        (torch.Size([5, 26]), False)
    """  # noqa: DOC502
    if method not in {"auto", "xdiag", "hutchinson"}:
        raise ValueError(f"diagonal: method must be 'auto', 'xdiag' or 'hutchinson', got {method!r}")
    exact, why = _exact(H, num_matvecs, "diagonal") if method == "auto" else (None, "asked for")
    if exact is not None:
        return exact
    _check_count(num_matvecs, "diagonal")
    batched = as_batched(H, "diagonal")
    if method != "hutchinson":
        return _xdiag(batched, num_matvecs // 2, own_generator(generator), why)
    generator = own_generator(generator)
    total, squares = (torch.zeros(batched.size, dtype=torch.float64, device=batched.device) for _ in range(2))
    for count in _portions(num_matvecs):
        signs = random_signs(batched, count, generator)
        samples = (signs * batched.product(signs)).double()
        total += samples.sum(2)
        squares += samples.square().sum(2)
    mean = total / num_matvecs
    variance = (squares - num_matvecs * mean.square()).clamp_min(0) / (num_matvecs - 1)
    stderr = (variance / num_matvecs).sqrt()
    return Estimate(mean.to(batched.dtype), stderr.to(batched.dtype), False, "hutchinson", why)


def _check_count(num_matvecs: int, function: str) -> None:
    if num_matvecs < 4:
        raise ValueError(f"{function}: num_matvecs must be at least 4, got {num_matvecs}")


def _portions(count: int) -> list[int]:
    """Vectors at a time: many of a large net do not fit into memory."""
    return [min(8, count - start) for start in range(0, count, 8)]


def _exact(H: LinearOperator | Tensor, num_matvecs: int, function: str) -> tuple[Estimate | None, str]:
    """The diagonal, if theory gives it or if unit vectors are no more work than random ones; and why."""
    why = "H is not a HessianOperator"
    if isinstance(H, Tensor):
        own = (H if H.dim() == 3 else H.unsqueeze(0)).diagonal(dim1=-2, dim2=-1)
        return Estimate(own, torch.zeros_like(own), True, "unit_vectors", "the matrices are given"), ""
    if isinstance(H, HessianOperator) and H.coupling == "block_diag":
        structure = structure_of(H.net, H.parameters, H.batches, CHUNK)
        why = structure.reason
        if structure.layers is not None and (structure.each_linear or H.kind == "ggn"):
            try:
                own = _gauss_newton_diagonal(H, structure.layers)
            except NoRootError as error:
                why = error.reason
            else:
                reason = "the diagonal of the Gauss-Newton term"
                if H.kind == "hessian":
                    reason = "piecewise linear in each parameter: the diagonal is that of the Gauss-Newton term"
                if H.kind == "residual":
                    own, reason = torch.zeros_like(own), "piecewise linear in each parameter: no diagonal"
                return Estimate(own, torch.zeros_like(own), True, "ggn", reason), ""
    batched = as_batched(H, function)
    B, P = batched.size
    if num_matvecs < P:
        return None, why
    own = torch.empty(B, P, dtype=batched.dtype, device=batched.device)
    for start in range(0, P, 64):
        stop = min(start + 64, P)
        eye = torch.zeros(P, stop - start, dtype=batched.dtype, device=batched.device)
        eye[range(start, stop), range(stop - start)] = 1
        product = batched.product(eye.expand(B, -1, -1).contiguous())
        own[:, start:stop] = product[:, start:stop].diagonal(dim1=1, dim2=2)
    return Estimate(own, torch.zeros_like(own), True, "unit_vectors", f"P={P} is at most {num_matvecs=}"), ""


def _gauss_newton_diagonal(H: HessianOperator, layers: dict[str, str]) -> Tensor:
    parameters = H.parameters
    total = torch.zeros(parameters.num_branches, parameters.sizes[0], dtype=torch.float64, device=H.device)
    for chunk in chunks(H.net, layers, H.loss, H.batches, CHUNK):
        for column in chunk.columns():
            squares = [_sum_of_squares(column.gradients[name], column.signs) for name in parameters.names]
            total += torch.cat([own.flatten(1) for own in squares], 1)
    return total.to(H.dtype)


def _sum_of_squares(gradients: Tensor, signs: Tensor | None) -> Tensor:
    squares = gradients.square()
    return (squares if signs is None else squares * signs).sum(-1)


def _xdiag(batched: Batched, count: int, generator: torch.Generator, why: str) -> Estimate:
    """Each random vector estimates what the span of the other products does not know; the mean over vectors."""
    count = min(count, batched.size[1])
    signs = random_signs(batched, count, generator)
    Q, R = torch.linalg.qr(batched.product(signs))  # (B, P, m), (B, m, m)
    Z = batched.product(Q)  # A Q
    S = torch.linalg.pinv(R).mT
    S = S / S.norm(dim=1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
    # Column i of S is orthogonal to all columns of R but i; if R is singular there is none: nothing is missing then.
    products = S.mT @ R
    others = (products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))).norm(dim=2)
    bound = torch.finfo(S.dtype).eps ** 0.5 * R.norm(dim=(1, 2))[:, None]
    S = S * (others <= bound).unsqueeze(1)
    QS, ZS = Q @ S, Z @ S
    known = (Q * Z).sum(2)
    missing = -QS * ZS + signs * QS * (S * R).sum(1, keepdim=True)  # (B, P, m)
    return Estimate(known + missing.mean(2), missing.std(2) / count**0.5, False, "xdiag", why)
