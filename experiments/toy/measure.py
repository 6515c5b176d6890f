"""Numbers from responses, for many trials at once: active branches, covariances, stories, Hessian, equilibrium.

Responses are ``(trials, M, J)`` with M branches and J samples, as :func:`bsfast.toy.train` returns them.
"""

import numpy as np
from numpy.typing import NDArray

ACTIVE = 0.1  # share of the largest response below which a branch is silent
_NO_RESPONSE = 1e-3  # norm of a gradient, relative to the root mean square, below which it counts as zero
_FITTED = 1e-3  # |f - y| below which a sample counts as fitted

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


def hessian_block_norms(responses: Array, x: Array, slope: float) -> Array:
    r"""Frobenius norms of the blocks of the loss's Hessian in the weights and biases.

    A branch is piecewise linear in (w, b), so the Hessian of half the summed squares is exactly Gauss-Newton's:
    :math:`H_{kl} = \sum_j s_{kj} s_{lj} (x_j, 1)(x_j, 1)^\top`, with s the derivative of LeakyReLU.

    Args:
        responses: Branch outputs.
        x: Samples, ``(J,)``.
        slope: Slope of LeakyReLU below zero, above 0.

    Returns:
        Norms of the 2 x 2 blocks, ``(trials, M, M)``.
    """
    derivative = _derivative(responses, slope)
    inputs = np.stack([x, np.ones_like(x)], axis=1)
    blocks = np.einsum("tkj,tlj,jp,jq->tklpq", derivative, derivative, inputs, inputs, optimize=True)
    return np.linalg.norm(blocks, axis=(3, 4))


def block_diagonality(norms: Array) -> Array:
    """Share of the squared Hessian that lies in its diagonal blocks, ``(trials,)``; 1 if it is block-diagonal."""
    squares = norms**2
    return np.einsum("tkk->t", squares) / squares.sum(axis=(1, 2))


def coherence(norms: Array, chosen: Mask) -> Array:
    """Mean of ||H_kl|| / sqrt(||H_kk|| ||H_ll||) over pairs of chosen branches, ``(trials,)``; NaN without a pair.

    Unlike block-diagonality it does not depend on the size of the blocks, so silent branches count as active ones do.

    Args:
        norms: Norms of the Hessian's blocks, ``(trials, M, M)``.
        chosen: Which branches count, ``(trials, M)``.

    Returns:
        The mean, at most 1.
    """
    own = np.einsum("tkk->tk", norms)
    ratios = norms / np.sqrt(own[:, :, None] * own[:, None, :])
    pairs = chosen[:, :, None] & chosen[:, None, :] & ~np.eye(norms.shape[1], dtype=bool)
    count = pairs.sum(axis=(1, 2))
    return np.where(pairs, ratios, 0).sum(axis=(1, 2)) / np.where(count > 0, count, np.nan)


def equilibrium(responses: Array, x: Array, y: Array, slope: float) -> dict[str, Array]:
    r"""Measure why gradients are small where they are: the paper's section 8.

    The gradient of sample j for branch k is :math:`g_j \, \partial v_k(x_j) / \partial\theta_k` with
    :math:`g_j = f(x_j) - y_j` ("collaborative"); the other factor ("distributive") is :math:`s_{kj} (x_j, 1)`.

    Args:
        responses: Branch outputs.
        x: Samples, ``(J,)``.
        y: Targets, ``(J,)``.
        slope: Slope of LeakyReLU below zero.

    Returns:
        Shares of each trial, ``(trials,)``: of pairs (k, j), ``distributive_zero`` with a distributive factor below
        1e-3 of its root mean square, and ``negative`` with LeakyReLU below zero; of samples, ``fitted_samples`` with
        the size of g below 1e-3.
    """
    distributive = _derivative(responses, slope) * np.hypot(x, 1)
    rms = np.sqrt((distributive**2).mean(axis=(1, 2), keepdims=True))
    return {
        "distributive_zero": (distributive < _NO_RESPONSE * rms).mean(axis=(1, 2)),
        "negative": (responses <= 0).mean(axis=(1, 2)),
        "fitted_samples": (abs(responses.sum(axis=1) - y) < _FITTED).mean(axis=1),
    }


def _derivative(responses: Array, slope: float) -> Array:
    """Derivative of LeakyReLU, whose output has the sign of its input."""
    return np.where(responses > 0, 1.0, slope)
