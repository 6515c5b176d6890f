"""Linear operators on vectors of parameters: what can be multiplied, added, scaled, transposed and made dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator  # type: ignore[import-untyped]

CHEAPER: Final = (
    "choose fewer params, such as one layer, or products (H @ v), eigsh, trace, diagonal or spectral_density"
)


class LinearOperator(ABC):
    """A matrix known by its products.

    Attributes:
        shape: Rows and columns.
        dtype: Of its elements.
        device: Where its products are computed.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def columns(self, vectors: Tensor) -> Tensor:
        """Multiply by ``(columns, K)``; gives ``(rows, K)``."""

    @property
    @abstractmethod
    def T(self) -> LinearOperator:  # noqa: N802 (as in torch and NumPy)
        """The transpose."""

    def __matmul__(self, vector: Any) -> Any:
        """Multiply by a vector ``(columns,)`` or a matrix ``(columns, K)``; or compose two operators.

        Args:
            vector: Vector, matrix or operator.

        Returns:
            Of the same kind.

        Raises:
            ValueError: If the shape does not fit.
            TypeError: If the dtype does not.
        """
        if isinstance(vector, LinearOperator):
            return Composed(self, vector)
        if not isinstance(vector, Tensor) or vector.dtype != self.dtype:
            got = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
            raise TypeError(f"{type(self).__name__}: a vector must be a tensor of {self.dtype}, got {got}")
        if vector.dim() not in {1, 2} or vector.shape[0] != self.shape[1]:
            n = self.shape[1]
            raise ValueError(
                f"{type(self).__name__}: a vector must have shape ({n},) or ({n}, K), got {tuple(vector.shape)}"
            )
        return self.columns(vector.reshape(self.shape[1], -1)).reshape(self.shape[0], *vector.shape[1:])

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """The sum of two operators."""
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        """The difference of two operators."""
        return Sum(self, -1.0 * other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float) -> LinearOperator:
        """A multiple."""
        return Scaled(self, float(factor)) if isinstance(factor, (int, float)) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return Scaled(self, -1.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"

    def to_dense(self, *, max_bytes: int = 2**30, columns_at_once: int = 64) -> Tensor:
        """The matrix, one product a column.

        Args:
            max_bytes: Most memory that it may take, bytes.
            columns_at_once: Columns of the identity that are made at a time.

        Returns:
            Shape :attr:`shape`.

        Raises:
            ValueError: If it takes more.
        """
        rows, count = self.shape
        size = rows * count * self.dtype.itemsize
        if size > max_bytes:
            raise ValueError(
                f"to_dense: the matrix must take at most max_bytes={max_bytes / 2**30:.3g} GiB, got "
                f"{size / 2**30:.3g} GiB for {rows} x {count}; {CHEAPER}"
            )
        dense = torch.empty(rows, count, dtype=self.dtype, device=self.device)
        for start in range(0, count, columns_at_once):
            stop = min(start + columns_at_once, count)
            units = torch.zeros(count, stop - start, dtype=self.dtype, device=self.device)
            units[range(start, stop), range(stop - start)] = 1
            dense[:, start:stop] = self.columns(units)
        return dense

    def to_scipy(self) -> ScipyOperator:
        """The same operator on NumPy arrays, for ``scipy.sparse.linalg``.

        Returns:
            The operator.

        Raises:
            ModuleNotFoundError: If SciPy is not installed.
        """  # noqa: DOC502
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        operator, transposed = self, self.T

        class OnArrays(ScipyOperator):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__(torch.empty(0, dtype=operator.dtype).numpy().dtype, operator.shape)

            def _matmat(self, array: Any) -> Any:
                return _on_array(operator, array)

            def _matvec(self, array: Any) -> Any:
                return _on_array(operator, array.reshape(-1, 1))[:, 0]

            def _rmatmat(self, array: Any) -> Any:
                return _on_array(transposed, array)

            def _rmatvec(self, array: Any) -> Any:
                return _on_array(transposed, array.reshape(-1, 1))[:, 0]

        return OnArrays()


def _on_array(operator: LinearOperator, array: Any) -> Any:
    columns = torch.as_tensor(array).to(dtype=operator.dtype, device=operator.device)
    return operator.columns(columns).cpu().numpy()


class Sum(LinearOperator):
    """A + B."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            raise ValueError(f"+: operators must have one shape, dtype and device, got {a} and {b}")
        self.a, self.b = a, b
        self.shape, self.dtype, self.device = a.shape, a.dtype, a.device

    def columns(self, vectors: Tensor) -> Tensor:
        """A V + B V."""
        return self.a.columns(vectors) + self.b.columns(vectors)

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """The transpose."""
        return Sum(self.a.T, self.b.T)


class Scaled(LinearOperator):
    """c A."""

    def __init__(self, a: LinearOperator, factor: float) -> None:
        self.a, self.factor = a, factor
        self.shape, self.dtype, self.device = a.shape, a.dtype, a.device

    def columns(self, vectors: Tensor) -> Tensor:
        """C (A V)."""
        return self.factor * self.a.columns(vectors)

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """The transpose."""
        return Scaled(self.a.T, self.factor)


class Composed(LinearOperator):
    """A B."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        if a.shape[1] != b.shape[0] or (a.dtype, a.device) != (b.dtype, b.device):
            raise ValueError(f"@: operators must fit, got {a} and {b}")
        self.a, self.b = a, b
        self.shape, self.dtype, self.device = (a.shape[0], b.shape[1]), a.dtype, a.device

    def columns(self, vectors: Tensor) -> Tensor:
        """A (B V)."""
        return self.a.columns(self.b.columns(vectors))

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """The transpose."""
        return Composed(self.b.T, self.a.T)
