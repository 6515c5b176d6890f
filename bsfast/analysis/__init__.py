"""Measure specialization: response covariance, active branches, shares of energy, confidence.

Inputs are branch outputs :math:`v_k(x_j)`, as ``branch_outputs`` returns them, or what this package made of them:
float32 or float64 (else ``TypeError``), finite and not empty (else ``ValueError``), on any device. Results keep dtype
and device. What is undefined (the cosine of a zero response, a mean over no pair) is NaN, not a number that looks
measured. Squares of float32 outputs are 0 below 1e-23, lose digits below 1e-19 and are infinite above 1e19: pass such
outputs as float64.

"The paper" is Brokman & Gilboa, Analysis of Branch Specialization and its Application in Image Decomposition,
arXiv 2206.05810.
"""

from bsfast.analysis.classes import (
    class_summary,
    completeness,
    confidence,
    energy_shares,
    region_energy,
    selectivity,
)
from bsfast.analysis.responses import (
    active_branches,
    cosine,
    covariance,
    offdiag_cosine,
    offdiag_ratio,
    pearson,
    response_matrix,
)

__all__ = [
    "active_branches",
    "class_summary",
    "completeness",
    "confidence",
    "cosine",
    "covariance",
    "energy_shares",
    "offdiag_cosine",
    "offdiag_ratio",
    "pearson",
    "region_energy",
    "response_matrix",
    "selectivity",
]
