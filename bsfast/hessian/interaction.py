"""How much the branches' Hessian blocks interact: Frobenius norms of all M x M blocks, and what follows from them.

The norm of a block of two branches is exact from its P x P elements or, as ``||V_k S V_l^T||_F^2 = <S G_k S, G_l>``,
from the Gram matrices G_k = V_k^T V_k of the columns, of size N K x N K; the smaller ones are formed. A branch's own
block needs its elements, unless it is its Gauss-Newton block.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from bsfast.hessian.blocks import blocks_of
from bsfast.hessian.jacobian import CHUNK, NoRootError, chunks, packed
from bsfast.hessian.operator import HessianOperator
from bsfast.hessian.parameters import substituted
from bsfast.hessian.structure import Structure, structure_of
from bsfast.hessian.symmetric import as_batched, own_generator, random_signs

LARGEST_DENSE: Final = 2048  # parameters of a branch up to which its own block is formed by products
MOST_BYTES: Final = 2**30


class Interaction(NamedTuple):
    """Norms of blocks.

    Attributes:
        fro: ``||H_kl||_F``, ``(M, M)``.
        stderr: Standard errors, zero where exact; only norms of branches' own blocks are ever estimated.
        method: ``"blocks"`` or ``"gram"``.
        exact: Whether nothing is estimated.
        why: The reason for the method.
    """

    fro: Tensor
    stderr: Tensor
    method: str
    exact: bool
    why: str

    @property
    def beta(self) -> float:
        """Block-diagonality sum_k ||H_kk||^2 / ||H||^2: 1 if block diagonal, 1 / M if all blocks are alike."""
        squares = self.fro.double().square()
        total = squares.sum().item()
        return squares.diagonal().sum().item() / total if total else 1.0

    @property
    def kappa(self) -> Tensor:
        """Coherence ||H_kl|| / sqrt(||H_kk|| ||H_ll||), ``(M, M)``; 0 where a branch's own block is zero."""
        own = self.fro.diagonal().sqrt()
        scale = own[:, None] * own
        return torch.where(scale > 0, self.fro / torch.where(scale > 0, scale, 1), 0)

    def mean_kappa(self, branches: Tensor | None = None) -> float:
        """Mean coherence of all pairs of two branches, or of those among ``branches``, a mask ``(M,)``."""
        chosen = torch.ones(len(self.fro), dtype=torch.bool) if branches is None else branches.bool().cpu()
        kappa = self.kappa.cpu()[chosen][:, chosen]
        pairs = ~torch.eye(len(kappa), dtype=torch.bool)
        return kappa[pairs].mean().item() if len(kappa) > 1 else 0.0


def block_interaction(
    H: HessianOperator, *, method: str = "auto", num_matvecs: int = 32, generator: torch.Generator | None = None
) -> Interaction:
    """Frobenius norms of all blocks of two branches and of every branch's own.

    Args:
        H: Hessian of any coupling; the norms are those of the whole.
        method: ``"blocks"``, ``"gram"``, or ``"auto"`` for the smaller.
        num_matvecs: Random vectors for the norms of branches' own blocks where these are neither Gauss-Newton blocks
            nor small enough to be formed.
        generator: Random numbers; by default ones of a fixed seed.

    Returns:
        The norms.

    Raises:
        ValueError: If the method cannot be used.
        TypeError: If H is not a :class:`HessianOperator`.

    Example:
        >>> import bsfast
        >>> net = bsfast.fuse(lambda: torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), num_branches=5)
        >>> H = HessianOperator(net, torch.nn.CrossEntropyLoss(), (torch.randn(7, 3), torch.randint(2, (7,))))
        >>> result = block_interaction(H)
        >>> result.fro.shape, result.kappa.shape, 0 < result.beta <= 1
        (torch.Size([5, 5]), torch.Size([5, 5]), True)
    """
    if not isinstance(H, HessianOperator):
        raise TypeError(f"block_interaction: H must be a HessianOperator, got {type(H).__name__}")
    if method not in {"auto", "blocks", "gram"}:
        raise ValueError(f"block_interaction: method must be 'auto', 'blocks' or 'gram', got {method!r}")
    P = H.parameters.size("block_interaction")
    whole = H.variant(coupling="full")
    structure = structure_of(H.net, H.parameters, H.batches, CHUNK)
    no_gram = _why_no_gram(whole, structure)
    if method == "gram" and no_gram:
        raise ValueError(f"block_interaction: method must be 'auto' or 'blocks' here, got 'gram': {no_gram}")
    columns = 0 if no_gram else _number_of_columns(whole)
    if method == "blocks" or (method == "auto" and (no_gram or columns >= P)):
        if whole.kind != "hessian":
            dense = whole.to_dense(max_bytes=2 * MOST_BYTES)
            M = H.parameters.num_branches
            fro = dense.view(M, P, M, P).double().square().sum((1, 3)).sqrt()
            return Interaction(fro, torch.zeros_like(fro), "blocks", True, "P x P blocks by products")
        result = blocks_of(whole, "all", "auto", structure)
        fro = torch.stack([torch.linalg.matrix_norm(row.double()) for row in result.tensor])
        return Interaction(fro, torch.zeros_like(fro), "blocks", True, f"P={P}: {result.why}")
    return _by_gram(whole, structure, num_matvecs, own_generator(generator), columns)


def _why_no_gram(whole: HessianOperator, structure: Structure) -> str:
    if structure.layers is None:
        return structure.reason
    if whole.kind == "residual":
        return "the residual has no blocks of two branches"
    example = whole.batches.few()
    with torch.no_grad(), substituted(whole.net, [], []):
        f = whole.net.branch_outputs(*example.inputs).sum(0)  # type: ignore[operator]
    return NoRootError.reason if whole.loss.root(f, example.target) is None else ""


def _number_of_columns(whole: HessianOperator) -> int:
    example = whole.batches.few()
    with torch.no_grad(), substituted(whole.net, [], []):
        f = whole.net.branch_outputs(*example.inputs).sum(0)  # type: ignore[operator]
    root = whole.loss.root(f, example.target)
    return 0 if root is None else whole.batches.num_data * root.columns.shape[2]


def _by_gram(
    whole: HessianOperator, structure: Structure, num_matvecs: int, generator: torch.Generator, columns: int
) -> Interaction:
    M, P = whole.parameters.num_branches, whole.parameters.sizes[0]
    size = M * columns * (columns + P) * 8
    if size > 4 * MOST_BYTES:
        raise ValueError(
            f"block_interaction: Gram matrices must take at most 4 GiB, got {size / 2**30:.1f}; take fewer samples"
        )
    grams, signs = _gram_matrices(whole, structure)
    signed = grams if signs is None else grams * signs[:, None] * signs
    squares = (grams.flatten(1) @ signed.flatten(1).T).clamp_min(0)
    fro, stderr = squares.sqrt(), torch.zeros_like(squares)
    own_is_gauss_newton = structure.one_layer_linear or whole.kind == "ggn"
    exact, why = True, f"N K={columns} is below P={P}"
    if not own_is_gauss_newton:
        norms, errors, exact = _own_norms(whole, structure, num_matvecs, generator)
        fro.diagonal().copy_(norms)
        stderr.diagonal().copy_(errors)
        why += "" if exact else "; norms of branches' own blocks are estimated"
    return Interaction(fro, stderr, "gram", exact, why)


def _gram_matrices(whole: HessianOperator, structure: Structure) -> tuple[Tensor, Tensor | None]:
    """Sum over parameters of V_k^T V_k, ``(M, N K, N K)``, float64, a few parameters at a time."""
    total, signs = None, None
    for names in _groups(whole):
        parts = [*_columns_of(whole, structure, names)]
        V = torch.cat([own for own, _ in parts], 2).double()
        term = V.mT @ V
        total = term if total is None else total.add_(term)
        if signs is None and any(own is not None for _, own in parts):
            signs = torch.cat([V.new_ones(own.shape[2]) if given is None else given.double() for own, given in parts])
    assert total is not None  # noqa: S101 (there is a parameter)
    return total, signs


def _columns_of(
    whole: HessianOperator, structure: Structure, names: tuple[str, ...]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    assert structure.layers is not None  # noqa: S101 (for the type checker)
    layers = {name: structure.layers[name] for name in names}
    for chunk in chunks(whole.net, layers, whole.loss, whole.batches, CHUNK):
        yield packed(chunk, names)


def _groups(whole: HessianOperator) -> list[tuple[str, ...]]:
    """Parameters whose columns together fit into memory; one pass of the data each."""
    parameters = whole.parameters
    groups: list[list[str]] = []
    room = MOST_BYTES // (parameters.num_branches * 16 * max(1, whole.batches.num_data))
    left = 0
    for name, shape in zip(parameters.names, parameters.shapes[0], strict=True):
        size = torch.Size(shape).numel()
        if not groups or size > left:
            groups.append([name])
            left = room - size
        else:
            groups[-1].append(name)
            left -= size
    return [tuple(group) for group in groups]


def _own_norms(
    whole: HessianOperator, structure: Structure, num_matvecs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, bool]:
    """||H_kk||_F from its elements, or from E||H_kk z||^2 over random signs z."""
    if whole.parameters.sizes[0] <= LARGEST_DENSE:
        own = torch.linalg.matrix_norm(blocks_of(whole, "diag", "auto", structure).tensor.double())
        return own, torch.zeros_like(own), True
    batched = as_batched(whole.variant(coupling="block_diag"), "block_interaction")
    squares = []
    for _ in range(num_matvecs):
        z = random_signs(batched, 1, generator)
        squares.append(batched.product(z).double().square().sum((1, 2)))
    values = torch.stack(squares, 1)
    mean, error = values.mean(1), values.std(1) / num_matvecs**0.5
    return mean.sqrt(), error / (2 * mean.sqrt()).clamp_min(torch.finfo(torch.float64).tiny), False
