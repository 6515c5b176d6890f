"""Begin a learnt diffusion as a smoother: before the training it imitates the Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.class_transfer.augment import to_signal
from experiments.class_transfer.diffusion import LearntDiffusion
from experiments.common.gaussian import gaussian_smooth
from experiments.common.streams import stream

_WARM_START = 2  # purpose of a stream of random numbers
_LR = 1e-3


def warm_start(
    smoother: LearntDiffusion, images: Tensor, *, steps: int, sigma: float, batch_size: int, seed: int
) -> float:
    """Minimise the mean of (R - G x)^2 by Adam, in place.

    Args:
        smoother: On any device.
        images: Pixels, uint8, shape ``(N, 3, H, W)``.
        steps: Number of steps, at least 1.
        sigma: Deviation of the Gaussian G, in pixels.
        batch_size: Images a step.
        seed: Seed of the batches.

    Returns:
        The last loss.
    """
    device = next(smoother.parameters()).device
    optimizer = torch.optim.Adam(smoother.parameters(), lr=_LR)
    for step in tqdm(range(steps), desc="smoother", disable=None):
        chosen = torch.randint(len(images), (batch_size,), generator=stream(seed, _WARM_START, step))
        x = to_signal(images[chosen.to(images.device)].to(device))
        loss = (smoother(x).R - gaussian_smooth(x, sigma)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(smoother.parameters(), 1.0)
        optimizer.step()
    return loss.item()
