"""The two factors of every branch's gradient: dL/df, which all branches share, and J_k, each branch's own.

The gradient of branch k is J_k^T (dL/df): the collaborative factor times the distributive one.
"""

import torch
from torch import Tensor, nn

from bsfast.hessian.data import Batch, Batches
from bsfast.hessian.linear_operator import LinearOperator
from bsfast.hessian.losses import as_loss
from bsfast.hessian.parameters import BranchParameters, Spec, substituted
from bsfast.hessian.product import tangents


class GradientFactors:
    """Factors of the gradients of one batch; made by :func:`gradient_factors`.

    Attributes:
        dldf: dL/df, shape ``(N, C)`` or as f.
        J: The Jacobians dv_k / dtheta_k of all branches, each an operator from ``(P_k,)`` to ``(N C,)``.
        parameters: The chosen parameters.
    """

    def __init__(self, net: nn.Module, parameters: BranchParameters, batch: Batch, dldf: Tensor) -> None:
        self._net, self._batch = net, batch
        self.parameters, self.dldf = parameters, dldf
        self.J = [JacobianOperator(net, parameters, batch, dldf.numel(), k) for k in range(parameters.num_branches)]
        self._gradients: list[Tensor] | None = None

    def grad(self, k: int) -> Tensor:
        """Gradient of the loss with respect to the parameters of branch k, ``J[k].T @ dldf``, flat, ``(P_k,)``."""
        if self._gradients is None:  # of all branches in one pass
            seed = self.dldf.expand(self.parameters.num_branches, *self.dldf.shape)
            flat = _pull(self._net, self.parameters, self._batch, seed)
            self._gradients = [flat[own] for own in self.parameters.slices()]
        return self._gradients[k]


class JacobianOperator(LinearOperator):
    """J_k = dv_k / dtheta_k of one branch and batch, rows ordered as ``v_k.flatten()``."""

    def __init__(
        self, net: nn.Module, parameters: BranchParameters, batch: Batch, rows: int, k: int, *, transposed: bool = False
    ) -> None:
        self._arguments = (net, parameters, batch, rows, k)
        self._transposed = transposed
        self.shape = (parameters.sizes[k], rows) if transposed else (rows, parameters.sizes[k])
        self.dtype, self.device = parameters.dtype, parameters.device

    @property
    def T(self) -> "JacobianOperator":  # noqa: N802
        """The transpose."""
        return JacobianOperator(*self._arguments, transposed=not self._transposed)

    def columns(self, vectors: Tensor) -> Tensor:
        """Multiply by ``(columns, K)``: one pass a column."""
        one = self._pull if self._transposed else self._push
        return torch.stack([one(vector) for vector in vectors.mT], 1)

    def gram(self) -> Tensor:
        """J_k J_k^T, ``(N C, N C)``."""
        J = self if not self._transposed else self.T
        rows = J.T.columns(torch.eye(J.shape[0], dtype=self.dtype, device=self.device))  # (P_k, N C)
        return rows.mT @ rows

    def _push(self, vector: Tensor) -> Tensor:
        net, parameters, batch, _, k = self._arguments
        flat = vector.new_zeros(parameters.total)
        flat[parameters.slices()[k]] = vector
        return tangents(net, parameters.tensors, batch, parameters.split(flat))[k].flatten()

    def _pull(self, vector: Tensor) -> Tensor:
        net, parameters, batch, _, k = self._arguments
        flat = _pull(net, parameters, batch, vector, k)
        return flat[parameters.slices()[k]]


def _pull(net: nn.Module, parameters: BranchParameters, batch: Batch, seed: Tensor, k: int | None = None) -> Tensor:
    """Every branch's J_k^T of its row of ``seed``, flat; with k, the seed is that branch's only."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in parameters.tensors]
        with substituted(net, parameters.tensors, leaves):
            v = net.branch_outputs(*batch.inputs)  # type: ignore[operator]
        outputs = v if k is None else v[k]
        if not outputs.requires_grad:
            return seed.new_zeros(parameters.total)
        grads = torch.autograd.grad(outputs, leaves, seed.reshape(outputs.shape), materialize_grads=True)
    return parameters.join(grads)


def gradient_factors(net: nn.Module, loss: object, batch: object, *, params: Spec = None) -> GradientFactors:
    """Split the gradients of one batch into the factor that branches share and the one that is their own.

    Args:
        net: As for :class:`HessianOperator`.
        loss: As for :class:`HessianOperator`.
        batch: One batch ``(x, y)``.
        params: As for :class:`HessianOperator`.

    Returns:
        ``dldf``, ``J`` and ``grad``; ``grad(k)`` equals autograd's.

    Raises:
        ValueError: If ``batch`` is several batches.

    Source: Brokman & Gilboa (2022), eq. 10.

    Example:
        >>> import bsfast
        >>> net = bsfast.fuse(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), num_branches=5)
        >>> g = gradient_factors(net, nn.CrossEntropyLoss(), (torch.randn(7, 3), torch.randint(2, (7,))))
        >>> g.dldf.shape, g.J[0].shape, g.grad(0).shape
        (torch.Size([7, 2]), (14, 26), torch.Size([26]))
    """  # noqa: DOC502
    own_loss, parameters = as_loss(loss), BranchParameters(net, params)
    given = list(Batches(net, own_loss, batch, chunk_size=None, check_deterministic=True))
    if len(given) != 1:
        raise ValueError(f"gradient_factors: batch must be one batch (x, y), got {len(given)}")
    with torch.no_grad(), substituted(net, [], []):
        f = net.branch_outputs(*given[0].inputs).sum(0)  # type: ignore[operator]
    return GradientFactors(net, parameters, given[0], own_loss.gradient(f, given[0].target))
