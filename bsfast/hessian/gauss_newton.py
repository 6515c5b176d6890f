"""Dense Gauss-Newton blocks J_k^T L'' J_l from per-sample Jacobians: one large matrix product.

In float32, products of at most 4096 columns are added up in float64.
"""

from itertools import combinations_with_replacement
from typing import Any, Final

import torch
from torch import Tensor

from bsfast import ops
from bsfast.hessian.jacobian import Chunk, chunks, packed
from bsfast.hessian.operator import HessianOperator
from bsfast.hessian.structure import Structure

MOST_COLUMNS: Final = 4096
MOST_BYTES: Final = 2**28  # of columns that wait for their matrix product


def by_columns(whole: HessianOperator, which: Any, structure: Structure, chunk: int) -> Tensor:
    """Blocks V_k V_l^T.

    Args:
        whole: The Hessian.
        which: As for :func:`bsfast.hessian.blocks`.
        structure: What is known of it; it must have ``layers``.
        chunk: Most samples at a time.

    Returns:
        As :attr:`bsfast.hessian.blocks.Blocks.tensor`.
    """
    assert structure.layers is not None  # noqa: S101 (for the type checker)
    products = _Products(whole, which)
    for own in chunks(whole.net, structure.layers, whole.loss, whole.batches, chunk):
        products.add(*packed(own, whole.parameters.names))
    return products.result()


class _Products:
    """Sum of V_k diag(signs) V_l^T over chunks."""

    def __init__(self, whole: HessianOperator, which: Any) -> None:
        self.which, self.dtype = which, whole.dtype
        self.M, self.P = whole.parameters.num_branches, whole.parameters.sizes[0]
        self.limit = max(1, min(MOST_COLUMNS, MOST_BYTES // (self.M * self.P * self.dtype.itemsize)))
        self.waiting: list[tuple[Tensor, Tensor | None]] = []
        self.count = 0
        self.total: Tensor | None = None

    def add(self, V: Tensor, signs: Tensor | None) -> None:
        if self.count and self.count + V.shape[2] > self.limit:
            self.flush()
        self.waiting.append((V, signs))
        self.count += V.shape[2]

    def flush(self) -> None:
        if not self.waiting:
            return
        V = torch.cat([own for own, _ in self.waiting], 2) if len(self.waiting) > 1 else self.waiting[0][0]
        signs = None
        if any(own is not None for _, own in self.waiting):
            signs = torch.cat([own.new_ones(own.shape[2]) if given is None else given for own, given in self.waiting])
        self.waiting, self.count = [], 0
        product = self._product(V, signs)
        if self.total is None:
            self.total = product
        else:
            self.total = self.total.double().add_(product)

    def _product(self, V: Tensor, signs: Tensor | None) -> Tensor:
        if self.which == "diag":
            return ops.gram(V, signs)
        if self.which == "all":
            return ops.gram(V.flatten(0, 1)[None], signs)[0]
        row, column = self.which
        return V[row] @ (V[column] if signs is None else V[column] * signs).mT

    def result(self) -> Tensor:
        self.flush()
        assert self.total is not None  # noqa: S101 (there is at least one batch)
        total = self.total.to(self.dtype)
        if self.which != "all":
            return total
        return total.view(self.M, self.P, self.M, self.P).transpose(1, 2)  # (M, M, P, P)


def khatri_rao(whole: HessianOperator, which: Any, structure: Structure, chunk: int) -> Tensor:
    """Blocks of a linear layer z_n = W a_n + b: sum_n B_n (x) a_n a_n^T with B_n = Z_k,n L''_n Z_l,n^T.

    Args:
        whole: The Hessian.
        which: As for :func:`bsfast.hessian.blocks`.
        structure: What is known of it; ``rank_one`` must hold.
        chunk: Most samples at a time.

    Returns:
        As :attr:`bsfast.hessian.blocks.Blocks.tensor`.
    """
    assert structure.layers is not None  # noqa: S101 (for the type checker)
    M = whole.parameters.num_branches
    pairs = {"diag": [(k, k) for k in range(M)], "all": [*combinations_with_replacement(range(M), 2)]}
    wanted = pairs.get(which, [which])
    total: dict[tuple[int, int], Tensor] = {}
    for own in chunks(whole.net, structure.layers, whole.loss, whole.batches, chunk):
        Z, signed, a = _factors(own, M)
        a = _with_bias(a, whole.parameters.names)
        for pair in wanted:
            row, column = pair
            B = torch.matmul(Z[row].mT, signed[column]).flatten(1)  # (N, out out)
            aa = (a[row].unsqueeze(2) * a[column].unsqueeze(1)).flatten(1)  # (N, in in)
            term = (B.mT @ aa).double()
            total[pair] = total[pair] + term if pair in total else term
        sizes = Z.shape[3], a.shape[2]
    order = _order(whole.parameters.names, *sizes)
    by_pair = {}
    for pair, value in total.items():
        block = value.view(sizes[0], sizes[0], sizes[1], sizes[1]).transpose(1, 2).reshape(order.numel(), -1)
        by_pair[pair] = block[order][:, order].to(whole.dtype)
    if which == "diag":
        return torch.stack([by_pair[k, k] for k in range(M)])
    if which == "all":
        rows = [[by_pair[k, j] if k <= j else by_pair[j, k].mT for j in range(M)] for k in range(M)]
        return torch.stack([torch.stack(row) for row in rows])
    return by_pair[which]


def _factors(chunk: Chunk, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """Z_k,n R_n, ``(M, N, K, out)``, the same with signs, and the layer's inputs a, ``(M, N, in)``."""
    (path, inputs), *_ = chunk.jacobian.inputs.items()
    columns = [chunk.jacobian.output_grads(seed)[path] for seed in chunk.seeds]
    Z = torch.stack(columns, 2)
    signed = Z if chunk.signs is None else Z * chunk.signs.mT[:, :, None]
    return Z, signed, inputs.expand(M, *inputs.shape[-2:])


def _with_bias(a: Tensor, names: tuple[str, ...]) -> Tensor:
    """Inputs of the chosen parameters of z = [W b] [a 1]: ``"weight"``, ``"bias"`` or both."""
    one = torch.ones_like(a[..., :1])
    leaves = [name.rpartition(".")[2] for name in names]
    return torch.cat([a if leaf == "weight" else one for leaf in leaves], 2)


def _order(names: tuple[str, ...], out_features: int, in_features: int) -> Tensor:
    """Positions in [W b], row-major, of the elements of the chosen parameters in their order."""
    grid = torch.arange(out_features * in_features).view(out_features, in_features)
    if len(names) == 1:
        return grid.flatten()
    leaves = [name.rpartition(".")[2] for name in names]
    parts = {"weight": grid[:, :-1], "bias": grid[:, -1:]} if leaves[0] == "weight" else {
        "bias": grid[:, :1], "weight": grid[:, 1:]}  # fmt: skip
    return torch.cat([parts[leaf].flatten() for leaf in leaves])
