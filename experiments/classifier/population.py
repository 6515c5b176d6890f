"""Several classifiers of different M and initialisation as one fused module, trained on the same batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bsfast
from experiments.classifier.loss import branched_losses
from experiments.classifier.model import make_branch
from experiments.classifier.setup import Setup


@dataclass(frozen=True)
class Model:
    """One classifier: M and the seed of its initialisation."""

    branches: int
    seed: int

    @property
    def name(self) -> str:
        """Short name, such as ``"m16-seed0"``."""
        return f"m{self.branches}-seed{self.seed}"


class Population:
    """Classifiers whose branches are those of one fused network, one model after the other.

    They share the batches and nothing else: the sum of their losses has no term with parameters of two of them, and
    SGD treats every parameter alone, so each is trained as it would be by itself.

    Args:
        setup: What to train.
        num_classes: Number of logits.
        batchnorm_momentum: Of the running statistics; None is their mean over all batches.

    Attributes:
        models: The classifiers.
        net: The fused network of all their branches.
    """

    def __init__(self, setup: Setup, num_classes: int, batchnorm_momentum: float | None = 0.1) -> None:
        self.models = [Model(size, seed) for size in setup.sizes for seed in setup.init_seeds]
        branches = [branch for model in self.models for branch in make_branches(model, setup, num_classes)]
        for layer in (layer for branch in branches for layer in branch.modules()):
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = batchnorm_momentum
        self.net = bsfast.fuse(branches).to(setup.device)
        self._clamp = setup.clamp

    def split(self, outputs: Tensor) -> list[Tensor]:
        """Split ``(all branches, N, C)`` into one ``(M, N, C)`` for each model."""
        return list(outputs.split([model.branches for model in self.models]))

    def branches_of(self, model: Model) -> list[nn.Module]:
        """Branches of one model, as copies in plain PyTorch."""
        index = self.models.index(model)
        start = sum(own.branches for own in self.models[:index])
        return bsfast.unfuse(self.net)[start : start + model.branches]

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Judge a batch.

        Args:
            outputs: Outputs of all branches, shape ``(all branches, N, C)``.
            labels: True classes, shape ``(N,)``.

        Returns:
            Mean over the batch, each of shape ``(models,)``: ``loss`` in nats, ``accuracy``, and ``saturated``, the
            share of samples with all logits outside [-1, 1].
        """
        sums = torch.stack([own.sum(0) for own in self.split(outputs)])
        return {
            "loss": branched_losses(sums, labels, clamp=self._clamp).mean(1),
            "accuracy": (sums.argmax(2) == labels).float().mean(1),
            "saturated": (sums.abs() > 1).all(2).float().mean(1),
        }


def make_branches(model: Model, setup: Setup, num_classes: int) -> Sequence[nn.Module]:
    """Make the branches of a model, from its seed.

    Args:
        model: Which.
        setup: Widths and scale of the readout.
        num_classes: Number of logits.

    Returns:
        M new modules.
    """
    scale = 1 / math.sqrt(model.branches) if setup.readout_scale is None else setup.readout_scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        branches = [make_branch(setup.widths, num_classes) for _ in range(model.branches)]
    with torch.no_grad():
        for branch in branches:
            branch.linear.weight.mul_(scale)
            branch.linear.bias.mul_(scale)
    return branches
