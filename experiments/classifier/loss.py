"""The classifier's loss: cross-entropy of the clamped sum against softened targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLAMPS = ("hard", "one_sided", "none")


def soft_targets(labels: Tensor, num_classes: int = 10) -> Tensor:
    """Softmax of +1 at the true class and -1 elsewhere.

    Args:
        labels: Class indices, int64, shape ``(N,)``.
        num_classes: Number of classes C.

    Returns:
        Probabilities, float32, shape ``(N, C)``; for 10 classes 0.450853 at the true class and 0.061016 elsewhere.

    Source: arXiv 2206.05810, section 5.
    """
    return torch.softmax(2.0 * torch.nn.functional.one_hot(labels, num_classes) - 1.0, dim=1)


def loss_floor(num_classes: int = 10) -> float:
    """Smallest possible loss, the entropy of the target, in nats; 1.894908 for 10 classes."""
    others = (num_classes - 1) * math.exp(-2)
    return math.log1p(others) + 2 * others / (1 + others)


def branched_loss(f: Tensor, labels: Tensor, *, clamp: str = "hard") -> Tensor:
    """Average :func:`branched_losses` over the samples; the result is a scalar, in nats."""
    return branched_losses(f, labels, clamp=clamp).mean(-1)


def sum_gradient(f: Tensor, labels: Tensor, *, clamp: str = "hard") -> Tensor:
    """Compute dL/df of every sample, the factor that all branches share.

    Args:
        f: Sum of the branches, shape ``(N, C)``.
        labels: Class indices, int64, shape ``(N,)``.
        clamp: As for :func:`branched_losses`.

    Returns:
        Gradients of each sample's own loss, shape ``(N, C)``.

    Source: arXiv 2206.05810, equation 10, with the sign of a descent.
    """
    f = f.detach().requires_grad_()
    (grad,) = torch.autograd.grad(branched_losses(f, labels, clamp=clamp).sum(), f)
    return grad


def branched_losses(f: Tensor, labels: Tensor, *, clamp: str = "hard") -> Tensor:
    r"""Cross-entropy :math:`-\sum_c p_c \log s(\mathrm{clamp}(f, -1, 1))_c` against :func:`soft_targets`.

    Args:
        f: Sums of the branches of one or more networks, shape ``(..., N, C)``.
        labels: Class indices, int64, shape ``(N,)``.
        clamp: ``"hard"`` (the paper's): no gradient where ``|f| > 1``. ``"one_sided"``: there the gradient passes if a
            descent step moves f back towards [-1, 1]. ``"none"``: no clamp.

    Returns:
        The loss of each sample, shape ``(..., N)``, in nats; never below :func:`loss_floor`.

    Raises:
        ValueError: If ``clamp`` is another word.
    """
    if clamp == "hard":
        f = f.clamp(-1, 1)
    elif clamp == "one_sided":
        f = _OneSidedClamp.apply(f)
    elif clamp != "none":
        raise ValueError(f"branched_losses: clamp must be one of {', '.join(CLAMPS)}, got {clamp!r}")
    return -(soft_targets(labels, f.shape[-1]).to(f.dtype) * torch.log_softmax(f, dim=-1)).sum(-1)


def saturated_shares(f: Tensor) -> tuple[float, float]:
    """Tell how much of f the hard clamp cuts off from the gradient.

    Args:
        f: Sum of the branches, shape ``(N, C)``.

    Returns:
        Share of logits with ``|f| > 1``, and share of samples with all logits so.
    """
    outside = f.abs() > 1
    return outside.float().mean().item(), outside.all(1).float().mean().item()


class _OneSidedClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, f: Tensor) -> Tensor:
        ctx.save_for_backward(f)
        return f.clamp(-1, 1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (f,) = ctx.saved_tensors
        passes = (f.abs() <= 1) | ((f > 1) & (grad > 0)) | ((f < -1) & (grad < 0))
        return torch.where(passes, grad, 0.0)
