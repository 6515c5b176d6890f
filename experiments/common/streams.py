"""Random numbers that are functions of a seed and of what they are for, so that resuming and reordering change none."""

from __future__ import annotations

import numpy as np
import torch


def stream(*words: int) -> torch.Generator:
    """Make a stream of random numbers of its own for each combination of words.

    Args:
        *words: Integers of at least 0, such as the seed, a number for the purpose, and the step.

    Returns:
        A generator on the CPU.
    """
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
