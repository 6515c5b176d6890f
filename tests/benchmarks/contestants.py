"""The ways to run and train M branches: bsfast and what stock PyTorch offers, all from the same parameters."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched
from tests.benchmarks.grouped import Grouped
from tests.benchmarks.network_case import NetworkCase

OWN = "bsfast"
TILES = f"{OWN}, 4x4 tiles"
COMPILED = "torch.compile of the loop"
LAST = ", channels_last"
MERGED = "merged to dense groups"  # not among CONTESTANTS: only matrix units multiply by zeros fast enough
CONTESTANTS = (OWN, TILES, "loop", f"loop{LAST}", "grouped", f"grouped{LAST}", "torch.func.vmap")


class Vmapped(nn.Module):
    """f(x) by ``torch.func.vmap`` over stacked parameters."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, buffers = torch.func.stack_module_state(list(branches))
        self.stacked = nn.ParameterDict({name.replace(".", "/"): value for name, value in parameters.items()})
        self.buffers_by_name = buffers
        self.template = [copy.deepcopy(branches[0]).to("meta")]  # in a list, so that its parameters are not ours

    def train(self, mode: bool = True) -> "Vmapped":
        self.template[0].train(mode)
        return super().train(mode)

    def forward(self, *inputs: Tensor) -> Tensor:
        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            return torch.func.functional_call(self.template[0], (parameters, buffers), inputs)

        parameters = {name.replace("/", "."): value for name, value in self.stacked.items()}
        axes = (0, 0, *[None] * len(inputs))
        return torch.func.vmap(run, axes)(parameters, self.buffers_by_name, *inputs).sum(0)


class Contestant:
    """One way to compute and train f, by its name.

    Args:
        name: Of :data:`CONTESTANTS`, or :data:`COMPILED`, or :data:`MERGED`, which may have ``LAST`` behind it.
        case: What to run.
    """

    def __init__(self, name: str, case: NetworkCase) -> None:
        branches = case.make_branches()
        self.tile = 4 if name == TILES else 2
        makers: dict[str, Callable[[], nn.Module]] = {
            OWN: lambda: bsfast.fuse(branches),
            TILES: lambda: bsfast.fuse(branches),
            "loop": lambda: ReferenceBranched(branches),
            "grouped": lambda: Grouped(branches, case.shared),
            MERGED: lambda: Grouped(branches, case.shared, merged=True),
            "torch.func.vmap": lambda: Vmapped(branches),
            COMPILED: lambda: torch.compile(ReferenceBranched(branches)),
        }
        self.net = makers[name.removesuffix(LAST)]()
        self.inputs, self.target = case.make_inputs()
        self.loss = case.loss
        if name.endswith(LAST):
            self.net = self.net.to(memory_format=torch.channels_last)
            last = torch.channels_last
            self.inputs = [x.contiguous(memory_format=last) if x.dim() == 4 else x for x in self.inputs]
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)

    def ready(self, phase: str) -> None:
        """Put the network into the mode of a phase, and the process into that of the contestant, which is not timed."""
        self.net.train(phase == "step")
        bsfast.ops.set_winograd_tile(self.tile)

    def forward(self) -> Tensor:
        """Return f(x), without gradients."""
        with torch.no_grad():
            return self.net(*self.inputs)

    def step(self, samples: int | None = None) -> None:
        """Train on all samples, or on the first ones."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.net(*[x[:samples] for x in self.inputs]), self.target[:samples]).backward()
        self.optimizer.step()
