"""Measure how the responses of branches relate: response matrix, covariance, active and silent branches."""

import torch
from torch import Tensor

from bsfast.analysis.check import check_real, check_tensor, shape_of


def response_matrix(outputs: Tensor) -> Tensor:
    r"""Flatten branch outputs to the response matrix F, one row a branch.

    :math:`F_{k,(j,c)} = v_k(x_j)_c`, samples outermost. Equivalent to ``outputs.flatten(1)``.

    Source: the paper, Fig. 3 (right) and Fig. 4, for one output; flattened over classes for Fig. 5.

    Args:
        outputs: Branch outputs, shape ``(M, N, ...)``.

    Returns:
        Response matrix, shape ``(M, N * C)`` with ``C`` the number of outputs a sample.

    Raises:
        ValueError: If ``outputs`` has fewer than two axes.

    Example:
        >>> response_matrix(torch.arange(8.0).reshape(2, 2, 2))
        tensor([[0., 1., 2., 3.],
                [4., 5., 6., 7.]])
    """
    check_real("response_matrix", "outputs", outputs)
    if outputs.dim() < 2:
        raise ValueError(f"response_matrix: outputs must have shape (M, N, ...), got {shape_of(outputs)}")
    return outputs.flatten(1)


def covariance(responses: Tensor) -> Tensor:
    r"""Compute the response covariance :math:`F F^\top`, neither centred nor divided by the number of samples.

    Source: the paper, "Cov" of Fig. 3 (right), Fig. 5 and Fig. 17 (right).

    Args:
        responses: Response matrix F, shape ``(M, D)``.

    Returns:
        Gram matrix of the branches, shape ``(M, M)``, in squared units of the output.

    Raises:
        ValueError: If ``responses`` is not a matrix.

    Example:
        >>> covariance(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        tensor([[ 5., -2.],
                [-2.,  1.]])
    """
    check_real("covariance", "responses", responses)
    if responses.dim() != 2:
        raise ValueError(f"covariance: responses must have shape (M, D), got {shape_of(responses)}")
    return responses @ responses.T


def cosine(cov: Tensor) -> Tensor:
    r"""Divide a covariance by the norms of its branches: :math:`C_{kl} / \sqrt{C_{kk} C_{ll}}`.

    Source: cosine similarity of the rows of F; scale-free companion of the paper's Fig. 5 "Cov".

    Args:
        cov: Covariance as :func:`covariance` returns it, shape ``(M, M)``.

    Returns:
        Cosines in [-1, 1], shape ``(M, M)``; NaN in the rows and columns of zero responses.

    Raises:
        ValueError: If ``cov`` is not square or has a negative diagonal entry.

    Example:
        >>> cosine(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]])
    """
    check_real("cosine", "cov", cov)
    if cov.dim() != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"cosine: cov must have shape (M, M), got {shape_of(cov)}")
    if (cov.diagonal() < 0).any():
        raise ValueError(f"cosine: cov must have a non-negative diagonal, got {cov.diagonal().min().item():g}")
    norms = cov.diagonal().sqrt()
    return (cov / norms[:, None] / norms[None, :]).clamp(-1, 1)


def pearson(responses: Tensor) -> Tensor:
    """Correlate the branches' responses: cosines after each row's mean is subtracted.

    Equivalent to ``torch.corrcoef``, but a constant row is recognised exactly.

    Source: Pearson correlation of the rows of F; location-free companion of the paper's Fig. 5 "Cov".

    Args:
        responses: Response matrix F, shape ``(M, D)``.

    Returns:
        Pearson correlations in [-1, 1], shape ``(M, M)``; NaN in the rows and columns of constant responses.

    Raises:
        ValueError: If ``responses`` is not a matrix.

    Example:
        >>> pearson(torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    check_real("pearson", "responses", responses)
    if responses.dim() != 2:
        raise ValueError(f"pearson: responses must have shape (M, D), got {shape_of(responses)}")
    rows = _unit_peak(_centre(responses))
    return cosine(rows @ rows.T)


def active_branches(responses: Tensor, threshold: float = 0.1, *, centred: bool = False) -> Tensor:
    r"""Say which branches are active; the others are silent.

    Branch k is active if :math:`\|F_k\|_2 \ge \tau \max_l \|F_l\|_2` with :math:`\tau` the threshold: relative to
    the largest branch, hence free of scale. When every response is zero, none is active.

    Source: the paper, Fig. 4 (right) and Fig. 5 (10 % of the largest norm).

    Args:
        responses: Response matrix or branch outputs, shape ``(M, ...)``; with ``centred``, branch outputs ``(M, N, C)``
            or ``(M, N, C, ...)``.
        threshold: Smallest norm of an active branch, as a fraction of the largest.
        centred: First subtract, for every branch and output, the mean over samples: a branch whose output does not
            depend on its input is then silent, however large it is.

    Returns:
        Boolean mask, shape ``(M,)``.

    Raises:
        ValueError: If ``threshold`` is outside (0, 1], or an axis is missing.

    Example:
        >>> active_branches(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.2, 0.3]]))
        tensor([ True,  True, False])
    """
    check_real("active_branches", "responses", responses)
    if not 0 < threshold <= 1:
        raise ValueError(f"active_branches: threshold must be in (0, 1], got {threshold}")
    if responses.dim() < 2:
        raise ValueError(f"active_branches: responses must have shape (M, ...), got {shape_of(responses)}")
    if centred and responses.dim() < 3:
        raise ValueError(
            f"active_branches: responses must have shape (M, N, C) when centred, got {shape_of(responses)}; "
            "pass the branch outputs, not the response matrix (scalar outputs: unsqueeze(-1))"
        )
    rows = (_centre(responses) if centred else responses).flatten(1)
    norms = torch.linalg.vector_norm(rows / _peak(rows), dim=1)
    active: Tensor = (norms >= threshold * norms.max()) & (norms > 0)
    return active


def offdiag_ratio(cov: Tensor) -> float:
    r"""Compare off-diagonal with diagonal covariance.

    The ratio :math:`\mathrm{mean}_{k \ne l} |C_{kl}| \,/\, \mathrm{mean}_k C_{kk}` is 0 for orthogonal branches and 1
    for identical ones.

    Source: scalar summary of the paper's Fig. 3 (right) and Fig. 5 "Cov".

    Args:
        cov: Covariance, shape ``(M, M)``.

    Returns:
        The ratio; NaN for one branch, or when all of ``cov`` is zero: that of zero responses, and of float32 responses
        below 1e-23, whose squares are 0: take the covariance of ``responses.double()``.

    Raises:
        ValueError: If ``cov`` is not square.

    Example:
        >>> offdiag_ratio(torch.tensor([[4.0, -1.0], [-1.0, 4.0]]))
        0.25
    """
    check_real("offdiag_ratio", "cov", cov)
    if cov.dim() != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"offdiag_ratio: cov must have shape (M, M), got {shape_of(cov)}")
    scaled = cov / _peak(cov)
    return (scaled[_off_diagonal(cov)].abs().mean() / scaled.diagonal().mean()).item()


def offdiag_cosine(cov: Tensor, active: Tensor) -> float:
    """Average |cosine| over the pairs of active branches.

    Source: redundancy of the active branches in the paper's Fig. 5 "Cov".

    Args:
        cov: Covariance, shape ``(M, M)``.
        active: Mask of :func:`active_branches`, boolean, shape ``(M,)``.

    Returns:
        Mean absolute cosine in [0, 1]; NaN if fewer than two branches are active.

    Raises:
        ValueError: If ``cov`` is not square or ``active`` does not fit it.

    Example:
        >>> offdiag_cosine(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), torch.tensor([True, True]))
        0.5
    """
    check_real("offdiag_cosine", "cov", cov)
    check_tensor("offdiag_cosine", "active", active)
    if cov.dim() != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"offdiag_cosine: cov must have shape (M, M), got {shape_of(cov)}")
    if active.dtype != torch.bool or active.shape != cov.shape[:1]:
        raise ValueError(
            f"offdiag_cosine: active must be boolean, of shape ({len(cov)},), got {active.dtype}, {shape_of(active)}"
        )
    pairs = active[:, None] & active[None, :] & _off_diagonal(cov)
    return cosine(cov)[pairs].abs().mean().item()


def _centre(x: Tensor) -> Tensor:
    """Subtract the mean over axis 1; a constant becomes exactly 0, because the first entry is subtracted before."""
    shifted = x - x[:, :1]
    return shifted - shifted.mean(1, keepdim=True)


def _peak(x: Tensor) -> Tensor:
    """Largest absolute value, or 1 if all are 0: a divisor that keeps squares from over- and underflow."""
    peak = x.abs().amax()
    return peak.where(peak > 0, 1)


def _unit_peak(rows: Tensor) -> Tensor:
    """Scale every row to a largest absolute value of 1; zero rows stay zero."""
    peaks = rows.abs().amax(1, keepdim=True)
    return rows / peaks.where(peaks > 0, 1)


def _off_diagonal(cov: Tensor) -> Tensor:
    return ~torch.eye(cov.shape[0], dtype=torch.bool, device=cov.device)
