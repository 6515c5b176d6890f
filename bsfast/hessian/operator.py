"""The Hessian of a branched network's loss as a linear operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from bsfast.hessian.data import Batches, ChunkSize
from bsfast.hessian.kept import Kept
from bsfast.hessian.linear_operator import LinearOperator
from bsfast.hessian.losses import as_loss
from bsfast.hessian.parameters import BranchParameters, Spec
from bsfast.hessian.product import COUPLINGS, KINDS, Coupling, Kind, product

MOST_KEPT: Final = 2**31  # 128 samples of 16 ResNets of 8 to 32 channels take 1.2 GiB


class HessianOperator(LinearOperator):
    """The Hessian of L(sum_k v_k(theta_k, x), y), averaged over data, in the parameters of all branches.

    Products accept, and return in the same form: flat vectors ``(D,)`` and matrices ``(D, K)``, branch-major;
    per-branch ones ``(M, P)`` and ``(M, P, K)``; dictionaries from names to ``(M, *shape)`` or ``(M, *shape, K)``. One
    product costs one dual forward and one dual backward pass of the whole net, whatever the coupling, or less: where
    convolutions run as one kernel with what follows them, values and gradients are kept between products.

    Buffers, gradients, modes and the global random state are as before after every call.

    Args:
        net: :class:`bsfast.Branched`, or :class:`bsfast.reference.ReferenceBranched`, whose branches may differ.
        loss: ``torch.nn.CrossEntropyLoss``, ``torch.nn.MSELoss``, a loss of :mod:`bsfast.hessian` or any
            ``(f, y) -> scalar``; see :class:`bsfast.hessian.Loss`.
        data: A batch ``(x, y)``, or a DataLoader or list of such batches; with a mean, a batch of |B| samples counts
            |B| / N.
        params: Name of a parameter or module of a branch, several of them, a dictionary with such keys, or None for
            all parameters that require gradients.
        coupling: ``"full"``; ``"block_diag"``, the blocks of one branch only; ``"cross"``, those of two.
        kind: ``"hessian"`` = ``"ggn"`` (J^T L'' J) + ``"residual"`` (the curvature of the branches themselves).
        num_data: N, if not the number of samples in ``data``.
        chunk_size: Most samples at a time, ``"auto"``, or None for whole batches.
        check_deterministic: Whether to check that two passes over the data agree.
        max_kept_bytes: Most memory that is kept between products, bytes; what does not fit is computed anew in each.

    Attributes:
        parameters: The chosen parameters.
        batches: The data.

    Raises:
        ValueError: If an argument does not fit; the message says which.
        TypeError: If an argument is of the wrong kind.
        RuntimeError: If two passes over the data differ.

    Source: Pearlmutter (1994), Fast exact multiplication by the Hessian; Brokman & Gilboa (2022), eqs. 13, 14.

    Example:
        >>> import bsfast
        >>> net = bsfast.fuse(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), num_branches=5)
        >>> H = HessianOperator(net, nn.CrossEntropyLoss(), (torch.randn(7, 3), torch.randint(2, (7,))))
        >>> H.shape, (H @ torch.ones(5, 26)).shape, (H[0, 1] @ torch.ones(26)).shape
        ((130, 130), torch.Size([5, 26]), torch.Size([26]))
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Any,
        data: Any,
        *,
        params: Spec = None,
        coupling: Coupling = "full",
        kind: Kind = "hessian",
        num_data: int | None = None,
        chunk_size: ChunkSize = "auto",
        check_deterministic: bool = True,
        max_kept_bytes: int = MOST_KEPT,
    ) -> None:
        if coupling not in COUPLINGS:
            raise ValueError(f"HessianOperator: coupling must be one of {COUPLINGS}, got {coupling!r}")
        if kind not in KINDS:
            raise ValueError(f"HessianOperator: kind must be one of {KINDS}, got {kind!r}")
        if not isinstance(max_kept_bytes, int) or max_kept_bytes < 0:
            raise ValueError(f"HessianOperator: max_kept_bytes must be an int of at least 0, got {max_kept_bytes!r}")
        self.net, self.loss = net, as_loss(loss)
        self.parameters = BranchParameters(net, params)
        self.batches = Batches(
            net, self.loss, data, num_data=num_data, chunk_size=chunk_size, check_deterministic=check_deterministic
        )
        self.coupling: Coupling = coupling
        self.kind: Kind = kind
        self._kept = Kept(net, self.parameters.tensors, self.loss, max_kept_bytes)
        self._set_shape()

    def _set_shape(self) -> None:
        self.shape = (self.parameters.total, self.parameters.total)
        self.dtype, self.device = self.parameters.dtype, self.parameters.device

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """``(M,)`` if the operator is block diagonal, so that per-branch methods apply; else ``()``."""
        return (self.parameters.num_branches,) if self.coupling == "block_diag" else ()

    @property
    def T(self) -> HessianOperator:  # noqa: N802
        """Itself: it is symmetric."""
        return self

    def variant(self, *, coupling: Coupling | None = None, kind: Kind | None = None) -> HessianOperator:
        """The operator of another coupling or kind, of the same net and data.

        Args:
            coupling: As for the class; the same by default.
            kind: As for the class; the same by default.

        Returns:
            A new operator.
        """
        other = object.__new__(HessianOperator)
        other.net, other.loss, other.parameters, other.batches = self.net, self.loss, self.parameters, self.batches
        other._kept = self._kept
        other.coupling, other.kind = coupling or self.coupling, kind or self.kind
        other._set_shape()
        return other

    def __matmul__(self, vector: Any) -> Any:
        """Multiply by a vector or matrix in any form; see the class.

        Args:
            vector: Vector, matrix, dictionary or operator.

        Returns:
            In the same form.

        Raises:
            ValueError: If the shape fits no form.
            TypeError: If the dtype or device is not that of the parameters.
        """  # noqa: DOC502
        if isinstance(vector, LinearOperator):
            return super().__matmul__(vector)
        columns, back = self.parameters.flat_from(vector)
        return back(self.columns(columns))

    def __rmatmul__(self, vector: Any) -> Any:
        """``u @ H`` for a vector ``(D,)``, or rows ``(K, D)``."""
        if isinstance(vector, Mapping) or vector.dim() == 1:
            return self @ vector
        return (self @ vector.mT).mT

    def columns(self, vectors: Tensor) -> Tensor:
        """Multiply by ``(D, K)``."""
        self.parameters.check_present(self.net)
        try:
            return self._columns(vectors)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{error}\nHessianOperator: a product must fit into memory; make the operator with a smaller "
                "chunk_size or max_kept_bytes, or, where samples depend on each other, with smaller batches"
            ) from error

    def _columns(self, vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        for batch, sweep in self._kept.batches(self.batches):
            for j in range(vectors.shape[1]):
                parts = product(
                    self.net,
                    self.parameters.tensors,
                    self.loss,
                    batch,
                    self.parameters.split(vectors[:, j].detach()),
                    coupling=self.coupling,
                    kind=self.kind,
                    sweep=sweep,
                )
                total[:, j] += self.parameters.join(parts)
        return total

    def per_branch(self, vectors: Tensor) -> Tensor:
        """Multiply by ``(M, P, K)``; gives ``(M, P, K)``."""
        return self.columns(vectors.reshape(self.parameters.total, -1)).view(vectors.shape)

    def __getitem__(self, block: tuple[int, int]) -> BranchBlock:
        """The block of branches k and l, ``(P_k, P_l)``, as an operator."""
        return BranchBlock(self, *block)


class BranchBlock(LinearOperator):
    """Rows of branch k and columns of branch l of a Hessian.

    Args:
        whole: The Hessian.
        k: Branch of the rows.
        l: Branch of the columns.

    Raises:
        IndexError: If there is no such branch.
    """

    def __init__(self, whole: HessianOperator, k: int, l: int) -> None:  # noqa: E741
        M = whole.parameters.num_branches
        if not (-M <= k < M and -M <= l < M):
            raise IndexError(f"HessianOperator: branches must be below M={M}, got [{k}, {l}]")
        self.whole, self.k, self.l = whole, k % M, l % M
        sizes = whole.parameters.sizes
        self.shape = (sizes[self.k], sizes[self.l])
        self.dtype, self.device = whole.dtype, whole.device

    def columns(self, vectors: Tensor) -> Tensor:
        """Multiply by ``(P_l, K)``: the others' parts of the vector are zero."""
        slices = self.whole.parameters.slices()
        padded = vectors.new_zeros(self.whole.shape[1], vectors.shape[1])
        padded[slices[self.l]] = vectors
        return self.whole.columns(padded)[slices[self.k]]

    @property
    def T(self) -> BranchBlock:  # noqa: N802
        """The block with the two branches exchanged."""
        return BranchBlock(self.whole, self.l, self.k)
