"""What Figures 2 to 4 count: active branches, covariances and the two stories of Figure 2, for many trials at once.

Responses are ``(trials, M, J)`` with M branches and J samples, as :func:`bsfast.toy.train` returns them.
"""

import numpy as np
from numpy.typing import NDArray

ACTIVE = 0.1  # share of the largest response below which a branch is silent

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def active_branches(responses: Array) -> Mask:
    """Tell which branches have at least a tenth of the largest response norm of their network, ``(trials, M)``."""
    norms = np.linalg.norm(responses, axis=2)
    return (norms >= ACTIVE * norms.max(axis=1, keepdims=True)) & (norms > 0)


def covariance(responses: Array) -> Array:
    """Un-centred covariance F Fᵀ of the branches, ``(trials, M, M)``."""
    return responses @ responses.swapaxes(1, 2)


def offdiag_ratio(covariances: Array) -> Array:
    """Mean size of the entries off the diagonal over the mean of those on it, ``(trials,)``."""
    M = covariances.shape[1]
    diagonal = np.einsum("tkk->t", covariances)
    rest = abs(covariances).sum(axis=(1, 2)) - diagonal
    return rest / (M - 1) / diagonal


def one_branch_each(responses: Array) -> Mask:
    """Panel A: every sample ends with exactly one active branch, ``(trials,)``."""
    largest = responses.max(axis=(1, 2), keepdims=True)
    return ((responses >= ACTIVE * largest).sum(axis=1) == 1).all(axis=1)


def late_and_shared(early: Array, responses: Array, last: int, shared: int) -> Mask:
    """Panel B: both branches are inactive on one sample at first, one takes it over, and they share another.

    Args:
        early: Responses at the first steps, ``(trials, steps, M, J)``.
        responses: Responses at the end.
        last: Index of the sample that is taken over.
        shared: Index of the sample on which all branches end active.

    Returns:
        Whether that is the trial's story, ``(trials,)``.
    """
    largest = responses.max(axis=(1, 2))
    inactive_at_first = (early[:, :, :, last] < 0.02).all(axis=(1, 2))
    taken_over = (responses[:, :, last] >= 0.5).any(axis=1)
    all_active = (responses[:, :, shared] >= ACTIVE * largest[:, None]).all(axis=1)
    return inactive_at_first & taken_over & all_active
