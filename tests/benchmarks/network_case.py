"""Whole networks to measure: M branches, their inputs and loss, and what a pass needs in operations and memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.classifier.model import make_branch
from tests.benchmarks.generator import Generator

CLASSES, STYLES = 10, 3
PHASES = ("forward", "step")  # evaluation without gradients; forward, loss, backward and SGD with momentum


class NetworkCase(NamedTuple):
    """M branches on N samples.

    Attributes:
        network: ``"resnet"`` (the paper's classifier, images of 32 pixels) or ``"generator"`` (images of 64).
        branches: M.
        samples: N.
        widths: Channels of the stages.
    """

    network: str = "resnet"
    branches: int = 16
    samples: int = 128
    widths: tuple[int, ...] = (8, 16, 32, 32)

    @property
    def name(self) -> str:
        widths = "-".join(map(str, self.widths))
        return f"{self.network}-M{self.branches}-N{self.samples}-{widths}"

    @property
    def shared(self) -> list[str]:
        """Paths of the modules that take the network's own inputs."""
        names = [name for name, _ in self.make_branch().named_modules()]
        return [name for name in names if name in {"conv1", "from_rgb"} or name.endswith((".scale", ".shift"))]

    def make_branch(self) -> nn.Module:
        return Generator(self.widths, STYLES) if self.network == "generator" else make_branch(self.widths, CLASSES)

    def make_branches(self) -> list[nn.Module]:
        """Return the same M branches at every call."""
        torch.manual_seed(0)
        return [self.make_branch() for _ in range(self.branches)]

    def make_inputs(self) -> tuple[list[Tensor], Tensor]:
        """Return the same inputs and target at every call."""
        torch.manual_seed(1)
        if self.network == "generator":
            style = F.one_hot(torch.arange(self.samples) % STYLES, STYLES).float()
            return [torch.randn(self.samples, 3, 64, 64), style], torch.randn(self.samples, 3, 64, 64)
        return [torch.randn(self.samples, 3, 32, 32)], torch.randint(CLASSES, (self.samples,))

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss if self.network == "generator" else F.cross_entropy

    def operations(self) -> dict[str, int]:
        """Count multiplications and additions of convolutions and matrices, padding included, in each phase."""
        branch, inputs, target = self._without_data()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            branch(*inputs)
        with FlopCounterMode(display=False) as step:
            self.loss(branch(*inputs), target).backward()
        counts = zip(PHASES, (forward, step), strict=True)
        return {phase: self.branches * counter.get_total_flops() for phase, counter in counts}

    def bytes_needed(self) -> dict[str, int]:
        """Estimate what a contestant that keeps all branches at once holds in each phase.

        In a step it is what stock operators save for the backward pass; in a forward pass a layer's input, its result,
        a shortcut and a converted copy, each as large as the largest of these.
        """
        branch, inputs, target = self._without_data()
        storages = {}

        def keep(saved: Tensor) -> Tensor:
            storages[saved.untyped_storage()._cdata] = saved.untyped_storage()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            self.loss(branch(*inputs), target)
        sizes = [storage.nbytes() for storage in storages.values()]
        return {"forward": 4 * self.branches * max(sizes), "step": self.branches * sum(sizes)}

    def _without_data(self) -> tuple[nn.Module, list[Tensor], Tensor]:
        inputs, target = self.make_inputs()
        return self.make_branch().to("meta"), [x.to("meta") for x in inputs], target.to("meta")
