"""Numbers about the Hessian of a classifier's branches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bsfast
from bsfast import analysis, hessian
from experiments.classifier import measure
from experiments.classifier.training import branch_responses
from experiments.common.augment import normalise

FIRST_LAYER = "conv1.weight"
LARGEST_MAP = 512  # cells a side; a panel has fewer pixels than the matrix has rows
_LANCZOS_STEPS = 20
_EQUILIBRIUM_IMAGES = 500


class Curvature(NamedTuple):
    """What was measured of M branches at one time.

    Attributes:
        magnitude: Mean of ``|H|`` over square cells of the first layer's Hessian, shape ``(cells, cells)``.
        interaction: Norms of its blocks.
        active: Which branches are active on the test set, shape ``(M,)``.
        eigenvalues: Of every branch's own block, descending, shape ``(M, P)``.
        density: Of the spectrum of whole branches, or None.
        equilibrium: As :func:`experiments.classifier.measure.equilibrium` returns it.
        why: How the Hessian was computed.
    """

    magnitude: Tensor
    interaction: hessian.Interaction
    active: Tensor
    eigenvalues: Tensor
    density: hessian.Density | None
    equilibrium: dict[str, float | list[float]]
    why: str

    def to_json(self) -> dict[str, Any]:
        """Numbers for the record."""
        own = self.interaction
        return {
            "beta": own.beta,
            "mean_kappa": own.mean_kappa(),
            "mean_kappa_active": own.mean_kappa(self.active),
            "active": int(self.active.sum()),
            "fro": own.fro,
            "kappa": own.kappa,
            "largest_eigenvalues": self.eigenvalues[:, :5],
            "equilibrium": self.equilibrium,
            "why": self.why,
        }


def loss_of(clamp: str) -> hessian.ClampedCrossEntropy:
    """The classifier's loss, with the paper's clamp or with none; targets are made from labels.

    Its one-sided clamp has the hard one's values, and so its Hessian; only what it calls a gradient differs.
    """
    return hessian.ClampedCrossEntropy(1.0 if clamp == "hard" else float("inf"))


def curvature(
    branches: list[nn.Module],
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    *,
    clamp: str,
    whole_branch_images: int = 0,
) -> Curvature:
    """Measure the Hessian of the first layer, of whole branches, and what their gradients are made of.

    Args:
        branches: M branches of a classifier on the CPU.
        images: Training images, uint8, shape ``(N, 3, H, W)``.
        labels: True classes, shape ``(N,)``.
        test_images: What tells the active branches, uint8.
        clamp: ``"hard"`` or ``"none"``.
        whole_branch_images: How many of the images the spectra of whole branches are averaged over; 0 for none.

    Returns:
        The numbers.
    """
    net, loss = bsfast.fuse(branches).eval(), loss_of(clamp)
    x = normalise(images)
    result = hessian.blocks(net, loss, (x, labels), params=FIRST_LAYER, which="all")
    fro = torch.stack([torch.linalg.matrix_norm(row.double()) for row in result.tensor])
    own = result.tensor.diagonal(dim1=0, dim2=1).movedim(2, 0).double()
    density = None
    if whole_branch_images:
        few = slice(whole_branch_images)
        H = hessian.HessianOperator(net, loss, (x[few], labels[few]), coupling="block_diag")
        density = hessian.spectral_density(H, lanczos_steps=_LANCZOS_STEPS, num_probes=1)
    few = slice(_EQUILIBRIUM_IMAGES)
    return Curvature(
        mean_of_cells(result.dense(), len(branches)),
        hessian.Interaction(fro, torch.zeros_like(fro), result.method, result.exact, result.why),
        analysis.active_branches(branch_responses(net, test_images)),
        torch.linalg.eigvalsh(own).flip(1),
        density,
        measure.equilibrium(branches, images[few], labels[few], clamp=clamp),
        f"{result.method}: {result.why}",
    )


def mean_of_cells(matrix: Tensor, num_branches: int) -> Tensor:
    """Average ``|H|`` over square cells, each within one block, so that at most 512 a side are left where that is so.

    Args:
        matrix: H, branch-major, shape ``(M P, M P)``.
        num_branches: M.

    Returns:
        Shape ``(cells, cells)``.
    """
    rows = len(matrix)
    size = rows // num_branches
    side = next(
        side for side in range(1, size + 1) if size % side == 0 and (rows // side <= LARGEST_MAP or side == size)
    )
    return matrix.abs().view(rows // side, side, rows // side, side).mean((1, 3))
