"""Eigenpairs of every branch's Hessian block by Lanczos, all branches in lockstep: one product a step serves all.

The basis is orthogonalised in full, twice, and the projected matrix is read off these products. Where a residual
vanishes (an invariant subspace, a zero Hessian) the branch goes on with a fresh random vector, so that further copies
of an eigenvalue and indefinite spectra are found.
"""

from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from bsfast.hessian.linear_operator import LinearOperator
from bsfast.hessian.symmetric import Batched, as_batched, own_generator, random_normal

Which = Literal["LM", "LA", "SA"]
SMALL: Final = 128  # up to this P the basis is completed


class EigResult(NamedTuple):
    """Eigenpairs of B = M branches.

    Attributes:
        values: ``(B, k)``; by magnitude for ``"LM"``, else by value, the most extreme first.
        vectors: ``(B, k, P)``, orthonormal in each branch.
        residuals: ``(B, k)``, norms of H v - lambda v, from the products themselves.
        converged: ``(B, k)``, whether the residual is at most ``tol`` times the largest known ``|lambda|``.
        num_matvecs: Products with a vector of each branch that it took.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_matvecs: int


class Krylov:
    """A Lanczos basis of every branch and the projected matrices.

    Args:
        batched: The matrices.
        start: First vectors, ``(B, P)``.
        max_steps: Most vectors a branch; ``B P`` of memory each, taken at once; twice that if images are kept.
        generator: For fresh vectors after a breakdown.
        restart: Whether to go on with a fresh vector after a breakdown; else the branch stops.
        keep_images: Whether to keep the products.

    Attributes:
        steps: Number of products so far.
        basis: ``(B, max_steps, P)``, its first ``steps`` rows in use.
        images: The products with these, if they are kept.
        alpha: Diagonal of the projected matrix, ``(B, max_steps)``, float64.
        beta: Next to the diagonal; entry j couples vectors j and j + 1; 0 after a breakdown.
    """

    def __init__(
        self,
        batched: Batched,
        start: Tensor,
        max_steps: int,
        generator: torch.Generator,
        *,
        restart: bool = True,
        keep_images: bool = False,
    ) -> None:
        B, P = batched.size
        self._batched, self._generator, self._restart = batched, generator, restart
        self.basis = torch.zeros(B, max_steps, P, dtype=batched.dtype, device=batched.device)
        self.images = torch.zeros_like(self.basis) if keep_images else None
        self.alpha = torch.zeros(B, max_steps, dtype=torch.float64)
        self.beta = torch.zeros(B, max_steps, dtype=torch.float64)
        self._scale = torch.zeros(B, dtype=torch.float64)
        self._next = self._normalised(start)
        self.steps = 0

    def step(self, frozen: Tensor | None = None) -> None:
        """Multiply once and extend every branch's basis by one vector.

        Args:
            frozen: Branches ``(B,)`` whose result is known already: they are multiplied by zero.
        """
        j, V = self.steps, self.basis
        V[:, j] = self._next if frozen is None else self._next * ~frozen.to(V.device)[:, None]
        w = self._batched.product(V[:, j].unsqueeze(2)).squeeze(2)
        if self.images is not None:
            self.images[:, j] = w
        self.alpha[:, j] = (w * V[:, j]).sum(1).double().cpu()
        known = V[:, : j + 1]
        for _ in range(2):
            w = w - _projected(known, w)
        norms = w.norm(dim=1).double().cpu()
        self._scale = torch.maximum(self._scale, self.alpha[:, j].abs() + norms)
        broken = norms <= 10 * torch.finfo(V.dtype).eps * V.shape[2] ** 0.5 * self._scale
        self.beta[:, j] = torch.where(broken, 0.0, norms)
        fresh = self._fresh(known) if self._restart and bool(broken.any()) else torch.zeros_like(w)
        go_on = w / torch.where(broken, 1.0, norms).to(w.dtype).to(w.device)[:, None]
        self._next = torch.where(broken.to(w.device)[:, None], fresh, go_on)
        self.steps += 1

    def _fresh(self, known: Tensor) -> Tensor:
        """Random unit vectors orthogonal to the basis; zero where it is complete."""
        w = random_normal(self._batched, 1, self._generator).squeeze(2)
        if known.shape[1] >= known.shape[2]:
            return torch.zeros_like(w)
        for _ in range(3):
            w = w - _projected(known, w)
            w = w / w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return w

    def _normalised(self, start: Tensor) -> Tensor:
        norms = start.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()) or not bool(norms.isfinite().all()):
            raise ValueError("eigsh: v0 must be finite and not zero in every branch, got one that is not")
        return start / norms

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(B, steps)``, ascending, and eigenvectors ``(B, steps, steps)`` of the projected matrices."""
        j = self.steps
        T = torch.diag_embed(self.alpha[:, :j])
        if j > 1:
            off = self.beta[:, : j - 1]
            T += torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        values, vectors = torch.linalg.eigh(T)
        return values, vectors


def _projected(known: Tensor, w: Tensor) -> Tensor:
    """The part of ``w``, ``(B, P)``, in the span of orthonormal rows ``(B, j, P)``."""
    coefficients = torch.stack([rows @ own for rows, own in zip(known, w, strict=True)])  # bmm takes six times as long
    return (coefficients.unsqueeze(1) @ known).squeeze(1)


def eigsh(
    H: LinearOperator | Tensor,
    k: int = 1,
    *,
    which: Which = "LM",
    tol: float = 1e-6,
    max_iter: int | None = None,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> EigResult:
    """Find k extreme eigenpairs of every branch's block, as ``scipy.sparse.linalg.eigsh`` of each would.

    Of an eigenvalue with several eigenvectors all are found if P is at most 128, where the basis is completed; else, as
    with any method that starts from one vector, maybe one.

    Args:
        H: A block-diagonal :class:`HessianOperator`; any other symmetric operator is one matrix (B = 1); or matrices.
        k: Number of pairs, at most P.
        which: ``"LM"``, largest magnitude; ``"LA"``, largest; ``"SA"``, smallest.
        tol: Relative to the largest eigenvalue known.
        max_iter: Most products; by default enough for well separated eigenvalues.
        v0: First vectors ``(B, P)``; random by default.
        generator: Random numbers; by default ones of a fixed seed.

    Returns:
        The pairs; those that did not converge are marked.

    Raises:
        ValueError: If k, ``which`` or ``v0`` does not fit.

    Source: Lanczos (1950); Parlett (1998), The symmetric eigenvalue problem.

    Example:
        >>> values = torch.arange(6.0)
        >>> eigsh(torch.stack([torch.diag(values), torch.diag(-values)]), k=2, which="LA").values.round().abs().tolist()
        [[5.0, 4.0], [0.0, 1.0]]
    """  # noqa: DOC502
    batched = as_batched(H, "eigsh")
    B, P = batched.size
    if not 1 <= k <= P:
        raise ValueError(f"eigsh: k must be between 1 and P={P}, got {k}")
    if which not in {"LM", "LA", "SA"}:
        raise ValueError(f"eigsh: which must be 'LM', 'LA' or 'SA', got {which!r}")
    if v0 is not None and tuple(v0.shape) != (B, P):
        raise ValueError(f"eigsh: v0 must have shape {(B, P)}, got {tuple(v0.shape)}")
    generator = own_generator(generator)
    start = random_normal(batched, 1, generator).squeeze(2) if v0 is None else v0.to(batched.dtype)
    most = min(P, max(k, max_iter if max_iter is not None else max(SMALL, 10 * k)))
    krylov = Krylov(batched, start, most, generator, keep_images=True)
    assert krylov.images is not None  # noqa: S101 (for the type checker)
    done = torch.zeros(B, dtype=torch.bool)
    values = torch.zeros(B, k, dtype=torch.float64)
    vectors, images = (torch.zeros(B, k, P, dtype=batched.dtype, device=batched.device) for _ in range(2))
    for j in range(1, most + 1):
        krylov.step(done)
        if j < k or (j < most and P <= SMALL):
            continue
        ritz, S = krylov.ritz()
        order = _order(ritz, which)
        chosen = order[:, :k]
        good = _converged(krylov, ritz, S, order, k, tol)
        for b in ((good | (j == most)) & ~done).nonzero().flatten().tolist():
            values[b] = ritz[b, chosen[b]]
            own = S[b][:, chosen[b]].mT.to(batched.dtype).to(batched.device)
            vectors[b], images[b] = own @ krylov.basis[b, :j], own @ krylov.images[b, :j]
        done |= good
        if bool(done.all()):
            break
    return _checked(values, vectors, images, tol, krylov)


def _converged(krylov: Krylov, ritz: Tensor, S: Tensor, order: Tensor, k: int, tol: float) -> Tensor:
    """Whether the first k Ritz pairs of each branch have small residuals, ``(B,)``."""
    # A branch that broke down must have gone on, and the first pair of what it found since must have converged as
    # well: it may be another copy of an eigenvalue, or one that the first vector had no part in.
    last = krylov.steps - 1
    small = (krylov.beta[:, last, None] * S[:, -1]).abs() <= tol * ritz.abs().amax(1, keepdim=True)
    numbers = torch.arange(last)
    began = torch.where(krylov.beta[:, :last] == 0, numbers + 1, 0).amax(1) if last else torch.zeros(len(ritz)).long()
    since = torch.arange(last + 1) >= began[:, None]  # (B, steps)
    recent = (S.square() * since[:, :, None]).sum(1) > 0.5
    rank = order.argsort(1)
    first_recent = torch.where(recent, rank, last + 1).argmin(1, keepdim=True)
    just_broken = (began == 0) & (krylov.beta[:, last] == 0)
    return small.gather(1, order[:, :k]).all(1) & small.gather(1, first_recent).squeeze(1) & ~just_broken


def _checked(values: Tensor, vectors: Tensor, images: Tensor, tol: float, krylov: Krylov) -> EigResult:
    values = values.to(vectors.dtype).to(vectors.device)
    norms = vectors.norm(dim=2, keepdim=True)
    vectors = vectors / norms
    residuals = (images / norms - vectors * values.unsqueeze(2)).norm(dim=2)
    scale = torch.maximum(values.abs().amax(1), krylov.alpha.abs().amax(1).to(values))
    floor = torch.finfo(vectors.dtype).eps * vectors.shape[2] ** 0.5
    converged = residuals <= 4 * max(tol, floor) * scale.unsqueeze(1)
    return EigResult(values, vectors, residuals, converged, krylov.steps)


def _order(values: Tensor, which: Which) -> Tensor:
    keys = {"LM": -values.abs(), "LA": -values, "SA": values}[which]
    return keys.argsort(1)
