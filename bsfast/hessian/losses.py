"""Losses of the sum f: gradient, Hessian products and roots of the Hessian, in closed form where there is one.

A loss here is convex or not, but a sum or mean over samples; its Hessian in f is one C x C matrix a sample.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTIONS: Final = ("mean", "sum")
MOST_OUTPUTS: Final = 4096  # C up to which roots are formed


class Root(NamedTuple):
    """R with R diag(signs) R^T = the loss's Hessian of every sample.

    Attributes:
        columns: Shape ``(N, C, K)``.
        signs: Shape ``(N, K)`` of 1 and -1, or None where all are 1.
    """

    columns: Tensor
    signs: Tensor | None = None


class Loss:
    """A scalar function of ``f`` and the targets, with derivatives in ``f`` by autograd; subclasses know better.

    Args:
        function: ``(f, y) -> scalar``. It may have the attributes ``reduction`` (``"mean"``, which is assumed without
            it, or ``"sum"``), ``hvp(f, y, u)``, the product of its Hessian in f with u, and ``sqrt(f, y)``, columns
            ``(N, C, K)`` whose outer products sum to the Hessian of each sample.

    Raises:
        ValueError: If the reduction is another word.

    Example:
        >>> def log_cosh(f, y):
        ...     return (f - y).cosh().log().sum(1).mean()
        >>> f, y = torch.zeros(3, 2), torch.ones(3, 2)
        >>> Loss(log_cosh).hvp(f, y, torch.ones(3, 2))[0]  # 1 / cosh(1)^2, over N=3
        tensor([0.1400, 0.1400])
    """

    def __init__(self, function: Callable[[Tensor, Any], Tensor]) -> None:
        self.function = function
        self.reduction: str = getattr(function, "reduction", "mean")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"hessian: loss must have reduction 'mean' or 'sum', got {self.reduction!r}")

    def value(self, f: Tensor, y: Any) -> Tensor:
        """The loss of a batch, a scalar."""
        value = self.function(f, y)
        if not isinstance(value, Tensor) or value.dim() > 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"hessian: loss must return a scalar tensor, got {shape}")
        return value

    def gradient(self, f: Tensor, y: Any) -> Tensor:
        """dL/df, shape of ``f``."""
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.value(f, y), f)
        return grad

    def hvp(self, f: Tensor, y: Any, u: Tensor) -> Tensor:
        """The Hessian in f times ``u``; u has the shape of ``f``, or axes before it."""
        own: Callable[[Tensor, Any, Tensor], Tensor] | None = getattr(self.function, "hvp", None)
        rows = u.reshape(-1, *f.shape)
        if own is not None:
            return torch.stack([own(f, y, row) for row in rows]).view(u.shape)
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.value(f, y), f, create_graph=True)
            if not grad.requires_grad:  # a loss that is linear in f
                return torch.zeros_like(u)
            products = [torch.autograd.grad(grad, f, row, retain_graph=True, materialize_grads=True)[0] for row in rows]
        return torch.stack(products).view(u.shape)

    def root(self, f: Tensor, y: Any) -> Root | None:
        """A root of every sample's Hessian, or None if the loss mixes samples or f has more than 4096 elements each."""
        own: Callable[[Tensor, Any], Tensor] | None = getattr(self.function, "sqrt", None)
        if own is not None:
            columns = own(f, y)
            if columns.dim() != 3 or columns.shape[:2] != (f.shape[0], f[0].numel()):
                raise ValueError(
                    f"hessian: loss.sqrt must return (N={f.shape[0]}, C={f[0].numel()}, K), got {tuple(columns.shape)}"
                )
            return Root(columns)
        matrices = self._matrices(f, y)
        if matrices is None:
            return None
        values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
        return Root(vectors * values.abs().sqrt().unsqueeze(1), values.sign() + (values == 0).to(values.dtype))

    def _matrices(self, f: Tensor, y: Any) -> Tensor | None:
        """Hessian of every sample, ``(N, C, C)``, if a product with a random vector agrees that there are no others."""
        size = f[0].numel()
        if size > MOST_OUTPUTS:
            return None
        units = torch.eye(size, dtype=f.dtype, device=f.device).view(size, 1, *f.shape[1:]).expand(size, *f.shape)
        matrices = self.hvp(f, y, units).flatten(2).permute(1, 2, 0)
        probe = torch.cos(torch.arange(1, f.numel() + 1, dtype=torch.float64, device=f.device) ** 2).to(f.dtype)
        expected = torch.einsum("ncd,nd->nc", matrices, probe.view(f.shape[0], size))
        got = self.hvp(f, y, probe.view(f.shape)).flatten(1)
        bound = 100 * torch.finfo(f.dtype).eps * size * max(expected.norm().item(), got.norm().item())
        return matrices if (got - expected).norm().item() <= bound else None


class CrossEntropy(Loss):
    """Cross-entropy of softmax(f), ``f`` of shape ``(N, C)``, as ``torch.nn.functional.cross_entropy``.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over samples.
        label_smoothing: As in torch.

    Example:
        >>> f, y, u = torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[1.0, -1.0]])
        >>> CrossEntropy().hvp(f, y, u)
        tensor([[ 0.5000, -0.5000]])
    """

    def __init__(self, reduction: str = "mean", label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        super().__init__(nn.CrossEntropyLoss(reduction=reduction, label_smoothing=label_smoothing))

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """As torch; ``y`` holds class indices ``(N,)``, or probabilities ``(N, C)``."""
        if f.dim() != 2 or y.shape not in {f.shape[:1], f.shape}:
            raise ValueError(
                f"hessian: cross-entropy must have f of shape (N, C) and targets (N,) or (N, C), "
                f"got {tuple(f.shape)} and {tuple(y.shape)}"
            )
        self._weights(f, y)
        return super().value(f, y)

    def hvp(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """Closed form: p u - p <p, u>."""
        p = f.softmax(-1)
        product = p * u - p * (p * u).sum(-1, keepdim=True)
        return product * self._weights(f, y)

    def root(self, f: Tensor, y: Tensor) -> Root | None:
        """C - 1 columns: diag(sqrt p) times a Householder basis of the complement of sqrt p; no 0/0 if p saturates."""
        weights = self._weights(f, y)
        if bool((weights < 0).any()):
            return super().root(f, y)
        q = f.softmax(-1).sqrt()
        unit = torch.zeros_like(q)
        unit[:, 0] = 1
        u = q + unit  # the reflection maps e_0 to -q, so its other columns span the complement of q
        basis = torch.eye(f.shape[1], dtype=f.dtype, device=f.device) - u[:, :, None] * u[:, None] / u[:, :1, None]
        return Root(q[:, :, None] * basis[:, :, 1:] * weights.sqrt()[:, :, None])

    def _weights(self, f: Tensor, y: Tensor) -> Tensor:
        """What each sample's softmax Hessian is multiplied by, ``(N, 1)``: probabilities may sum to other than 1."""
        count = f.shape[0] if self.reduction == "mean" else 1
        if y.shape == f.shape:
            return (self.label_smoothing + (1 - self.label_smoothing) * y.to(f.dtype).sum(1, keepdim=True)) / count
        if bool((y < 0).any()):
            raise ValueError("hessian: cross-entropy must have class indices of at least 0, got negative ones")
        return torch.full_like(f[:, :1], 1 / count)


class ClampedCrossEntropy(CrossEntropy):
    """The paper's loss: cross-entropy of softmax(clamp(f, -bound, bound)) against softened targets.

    Class indices become softmax of +1 at the true class and -1 elsewhere; targets ``(N, C)`` are taken as they are.
    Where ``|f| > bound`` gradient and Hessian are zero.

    Args:
        bound: Where f is clamped.
        reduction: ``"mean"`` or ``"sum"`` over samples.

    Source: arXiv 2206.05810, section 5.

    Example:
        >>> f, y = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([0])
        >>> ClampedCrossEntropy().gradient(f, y).sign()  # the last is beyond the bound
        tensor([[-1.,  1.,  0.]])
    """

    def __init__(self, bound: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.bound = bound

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """Loss of the clamped sum."""
        return super().value(f.clamp(-self.bound, self.bound), self._soft(f, y))

    def hvp(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """Closed form: the mask on both sides of the softmax Hessian."""
        mask = self._mask(f)
        return mask * super().hvp(f.clamp(-self.bound, self.bound), self._soft(f, y), mask * u)

    def root(self, f: Tensor, y: Tensor) -> Root | None:
        """The mask times the softmax root."""
        root = super().root(f.clamp(-self.bound, self.bound), self._soft(f, y))
        return root and Root(root.columns * self._mask(f)[:, :, None], root.signs)

    def _mask(self, f: Tensor) -> Tensor:
        return (f.abs() <= self.bound).to(f.dtype)

    def _soft(self, f: Tensor, y: Tensor) -> Tensor:
        if y.dim() != 1 or y.is_floating_point():
            return y.to(f.dtype)
        return torch.softmax(2 * F.one_hot(y, f.shape[1]).to(f.dtype) - 1, dim=1)


class MeanSquaredError(Loss):
    """Squared error, averaged over all elements or summed, as ``torch.nn.functional.mse_loss``; ``f`` of any shape.

    Args:
        reduction: ``"mean"`` or ``"sum"``.

    Example:
        >>> f, y = torch.zeros(1, 4), torch.zeros(1, 4)
        >>> MeanSquaredError().hvp(f, y, torch.ones(1, 4))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(nn.MSELoss(reduction=reduction))

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """As torch; no broadcasting."""
        if f.shape != y.shape:
            raise ValueError(f"hessian: mse must have targets of f's shape {tuple(f.shape)}, got {tuple(y.shape)}")
        return super().value(f, y)

    def hvp(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:  # noqa: ARG002 (the Hessian is constant)
        """Closed form: 2 u, over the number of elements if averaged."""
        return u * self._factor(f)

    def root(self, f: Tensor, y: Tensor) -> Root | None:  # noqa: ARG002
        """A multiple of the identity: C columns."""
        size = f[0].numel()
        if size > MOST_OUTPUTS:
            return None
        eye = torch.eye(size, dtype=f.dtype, device=f.device) * self._factor(f) ** 0.5
        return Root(eye.expand(f.shape[0], size, size))

    def _factor(self, f: Tensor) -> float:
        return 2 / f.numel() if self.reduction == "mean" else 2.0


def as_loss(loss: Any) -> Loss:
    """Recognise a loss.

    Args:
        loss: One of this module, ``torch.nn.CrossEntropyLoss``, ``torch.nn.MSELoss``, their functions, or any callable
            ``(f, y) -> scalar`` (:class:`Loss` says what attributes it may have).

    Returns:
        The loss with its derivatives.

    Raises:
        TypeError: If it cannot be called.
        ValueError: If it has a setting that batches cannot be averaged with: class weights, an ignored class.
    """
    if isinstance(loss, Loss):
        return loss
    if loss is F.cross_entropy:
        return CrossEntropy()
    if loss is F.mse_loss:
        return MeanSquaredError()
    if type(loss) is nn.MSELoss:
        return MeanSquaredError(loss.reduction)
    if type(loss) is nn.CrossEntropyLoss:
        if loss.weight is not None:
            raise ValueError("hessian: loss must be an average with equal weights, got CrossEntropyLoss(weight=...)")
        if loss.ignore_index >= 0:
            raise ValueError(f"hessian: loss must count every sample, got ignore_index={loss.ignore_index}")
        return CrossEntropy(loss.reduction, loss.label_smoothing)
    if not callable(loss):
        raise TypeError(f"hessian: loss must be callable with (f, y), got {type(loss).__name__}")
    return Loss(loss)
