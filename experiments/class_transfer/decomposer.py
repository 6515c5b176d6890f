"""The model: an image of another class, or of its own, as a smooth part plus what M branches draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bsfast

INPUTS = ("image", "bands")


class Decomposition(NamedTuple):
    """An output in parts: ``f = R + v.sum(0)``.

    Attributes:
        f: Output, shape ``(N, 3, H, W)``, not clamped.
        R: Smooth part of the input, shape ``(N, 3, H, W)``.
        v: What each branch adds, shape ``(M, N, 3, H, W)``.
        phi: Bands of the input, shape ``(M, N, 3, H, W)``, with ``x = R + phi.sum(0)``; None if R does not come with
            bands.
    """

    f: Tensor
    R: Tensor
    v: Tensor
    phi: Tensor | None


class Decomposer(nn.Module):
    r"""Class transfer by branches: :math:`f = R + \sum_k v_k`.

    Args:
        branches: Fused branches; each maps images ``(N, 3, H, W)`` and one-hot classes ``(N, K)`` to images.
        smoother: Maps images to R, or to R and M bands where its ``splits`` is true.
        num_classes: Number of classes K.
        inputs: ``"image"``: every branch sees the image; ``"bands"``: branch k sees band k only.

    Raises:
        ValueError: If ``inputs`` is another word, or the smoother makes no bands or another number of them.

    Source: arXiv 2206.05810, equations 15 to 17.
    """

    def __init__(self, branches: bsfast.Branched, smoother: nn.Module, num_classes: int, inputs: str) -> None:
        super().__init__()
        if inputs not in INPUTS:
            raise ValueError(f"Decomposer: inputs must be one of {', '.join(INPUTS)}, got {inputs!r}")
        bands = smoother.steps if smoother.splits else 0
        if inputs == "bands" and bands != branches.num_branches:
            raise ValueError(
                f"Decomposer: the smoother must make a band for each of {branches.num_branches} branches, got {bands}"
            )
        self.branches, self.smoother = branches, smoother
        self.num_classes, self.inputs = num_classes, inputs

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Transfer images to classes.

        Args:
            x: Images in -1 to 1, float32 or float64, shape ``(N, 3, H, W)``.
            target: Class of each output, int64, shape ``(N,)``.

        Returns:
            f, shape and dtype as x.
        """
        R, phi = self.split(x)
        shown = phi if self.inputs == "bands" else x
        drawn = self.branches(shown, self._style(x, target), per_branch=(self.inputs == "bands", False))
        return R + drawn.to(x.dtype)

    def decompose(self, x: Tensor, target: Tensor) -> Decomposition:
        """Transfer images to classes and keep the parts.

        Args:
            x: As :meth:`forward`.
            target: As :meth:`forward`.

        Returns:
            f and its parts.
        """
        R, phi = self.split(x)
        shown = phi if self.inputs == "bands" else x
        v = self.branches.branch_outputs(shown, self._style(x, target), per_branch=(self.inputs == "bands", False))
        v = v.to(x.dtype)
        return Decomposition(R + v.sum(0), R, v, phi)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the smooth part, and the bands or None; both in x's dtype, also under autocast."""
        # Bands are differences of nearly equal velocities, in which 16 bits would leave little but rounding.
        with torch.autocast(x.device.type, enabled=False):
            parts = self.smoother(x)
        return (parts.R, parts.phi) if self.smoother.splits else (parts, None)

    def _style(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.one_hot(target, self.num_classes).to(x.dtype)


def magnified(parts: Decomposition, branch: int, alpha: float) -> Tensor:
    """Output with one branch's part scaled by alpha; 1 is the output itself, and the result is affine in alpha."""
    return parts.f + (alpha - 1) * parts.v[branch]


def subset_sum(parts: Decomposition, branches: Sequence[int]) -> Tensor:
    """Sum of the parts of some branches, shape ``(N, 3, H, W)``; disjoint subsets that cover all give f - R."""
    return parts.v[list(branches)].sum(0)


def decompose_all(decomposer: Decomposer, x: Tensor, target: Tensor, *, batch_size: int = 64) -> Decomposition:
    """Decompose many images in batches, without gradients.

    Args:
        decomposer: On any device.
        x: Images in -1 to 1, shape ``(N, 3, H, W)``.
        target: Class of each output, int64, shape ``(N,)``.
        batch_size: Images at a time.

    Returns:
        The parts, on the CPU.
    """
    device = next(decomposer.parameters()).device
    with torch.no_grad():
        made = [
            decomposer.decompose(images.to(device), classes.to(device))
            for images, classes in zip(x.split(batch_size), target.split(batch_size), strict=True)
        ]
    f, R, v = (
        torch.cat([getattr(part, name).cpu() for part in made], dim) for name, dim in (("f", 0), ("R", 0), ("v", 1))
    )
    return Decomposition(f, R, v, None if made[0].phi is None else torch.cat([part.phi.cpu() for part in made], 1))
