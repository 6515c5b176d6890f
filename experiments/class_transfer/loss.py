"""Losses of the two players: non-saturating, with a penalty on the discriminator's gradient at real images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Penalise logits of real images below 0 and of generated ones above: mean of softplus(-real) + softplus(fake).

    Args:
        real: Logits of real images, shape ``(N,)``.
        fake: Logits of generated images, shape ``(N,)``.

    Returns:
        Scalar, in nats.

    Source: Goodfellow et al. (2014), Generative adversarial nets.
    """
    return softplus(-real).mean() + softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Penalise logits of generated images below 0: mean of softplus(-fake), in nats."""
    return softplus(-fake).mean()


def gradient_penalty(real: Tensor, images: Tensor) -> Tensor:
    """R1: half the squared gradient of each real image's logit, summed over pixels, mean over the batch.

    Args:
        real: Logits, shape ``(N,)``; logit n depends on image n only.
        images: What they were computed from, shape ``(N, 3, H, W)``, with ``requires_grad``.

    Returns:
        Scalar that can be differentiated again.

    Source: Mescheder et al. (2018), Which training methods for GANs do actually converge?, equation 9.
    """
    (grad,) = torch.autograd.grad(real.sum(), images, create_graph=True)
    return 0.5 * grad.square().flatten(1).sum(1).mean()
