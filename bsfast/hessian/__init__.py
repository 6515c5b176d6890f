"""Curvature of branched networks: Hessian products, exact blocks, spectra, traces and gradient factors."""

from bsfast.hessian.blocks import Blocks, blocks
from bsfast.hessian.density import Density, spectral_density
from bsfast.hessian.factors import GradientFactors, JacobianOperator, gradient_factors
from bsfast.hessian.interaction import Interaction, block_interaction
from bsfast.hessian.lanczos import EigResult, eigsh
from bsfast.hessian.linear_operator import LinearOperator
from bsfast.hessian.losses import ClampedCrossEntropy, CrossEntropy, Loss, MeanSquaredError
from bsfast.hessian.operator import HessianOperator
from bsfast.hessian.trace import Estimate, diagonal, trace

__all__ = [
    "Blocks",
    "ClampedCrossEntropy",
    "CrossEntropy",
    "Density",
    "EigResult",
    "Estimate",
    "GradientFactors",
    "HessianOperator",
    "Interaction",
    "JacobianOperator",
    "LinearOperator",
    "Loss",
    "MeanSquaredError",
    "block_interaction",
    "blocks",
    "diagonal",
    "eigsh",
    "gradient_factors",
    "spectral_density",
    "trace",
]
