"""A fused network's steps on one batch, kept so that derivatives can be passed through them, forward and backward.

One forward pass without gradients keeps the values of all steps. Where a convolution, a normalisation with running
statistics, a sum and a ReLU are one kernel, their derivatives are one kernel, too: the normalisation is folded into the
weights, other gradients are added and the ReLU's derivative is applied as a result is stored. All other steps are
differentiated one by one by autograd.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bsfast.fuse import joined
from bsfast.fuse.chains import Chain
from bsfast.fuse.program import Program, layer_at, resolve, run_step
from bsfast.fuse.steps import Ref, Step, module_at, refs
from bsfast.fuse.values import PerBranch
from bsfast.nn.folded import Folded, folds_exactly
from bsfast.nn.stacked import StackedModule, replaced

Place = tuple[str, int]  # a step, and which tensor of its value


class Local(NamedTuple):
    """What autograd recorded of one link that is not folded."""

    sources: dict[Place, Tensor]
    results: list[Tensor]


class Link(NamedTuple):
    """One step through which derivatives pass.

    Attributes:
        step: The step.
        sources: Places of what it takes that depends on the parameters.
        results: Places of its result.
        folded: The affine map, if the step is a chain that runs as one kernel; else None.
        reads: Whether it reads parameters itself.
    """

    step: Step
    sources: tuple[Place, ...]
    results: tuple[Place, ...]
    folded: Folded | None
    reads: bool

    @property
    def chain(self) -> Chain:
        """The chain, of a step that is one."""
        chain: Chain = self.step.target
        return chain


class Sweep:
    """One forward pass, and the links from parameters to the result.

    Args:
        net: The fused network.
        program: The program that it runs.
        tensors: The parameters, of the network.
        inputs: Tensors by argument name, per-branch or shared.
        wanted: Modules whose results must be those of a link, up to a normalisation that is folded into them.

    Attributes:
        values: By step, of those that passes need.
        links: In order.
        result: What the program returns.
        output: Place of the result, None if it does not depend on the parameters or is no tensor of each branch.
        shapes: By place, of all results of links.
        complete: Whether derivatives pass through all that depends on the parameters: not through complex numbers, and
            not through tensors that are not of each branch.
    """

    def __init__(
        self,
        net: StackedModule,
        program: Program,
        tensors: Sequence[Tensor],
        inputs: dict[str, Any],
        wanted: Sequence[nn.Module] = (),
    ) -> None:
        self.net = net
        self.inputs = inputs
        self.values: dict[str, Any] = {}
        self.links: list[Link] = []
        self._parameters = {id(tensor) for tensor in tensors}
        self._wanted = {id(module) for module in wanted}
        self.shapes: dict[Place, torch.Size] = {}
        self._dependent: set[str] = set()
        self.complete = True
        *steps, output = program.schedule(net)
        with torch.no_grad(), self.replaced(lambda own: own):  # buffers are copies
            for step in steps:
                self._run(step)
        self.result: Any = resolve(output.args[0], self.values)
        known = isinstance(output.args[0], Ref) and output.args[0].name in self._dependent
        self.output = (output.args[0].name, 0) if known and isinstance(self.result, PerBranch) else None
        self._drop_values()
        users = [(place, link.step.name) for link in reversed(self.links) for place in link.sources]
        self._first_user = dict(users)

    def _run(self, step: Step) -> None:
        folded = self._fold(step) if step.op == "chain" else None
        modules = self._modules(step)
        apart = step.op == "rewrite" and any(id(module) in self._wanted for module in modules)
        if apart or (step.op == "chain" and folded is None):
            for part in step.target.parts:
                self._run(part)
            return
        reads = self._reads(step, modules)
        sources = tuple(place for ref in refs(step) for place in self._places(ref.name))
        value = run_step(step, self.net, self.values, self.inputs, self.net.num_branches)
        # A parameter's memory may be taken for another use while its values are kept.
        self.values[step.name] = PerBranch(value.tensor.clone()) if step.op == "get_attr" else value
        if reads or sources:
            self._dependent.add(step.name)
            self.complete &= not any(_drops_derivatives(leaf) for leaf in pytree.tree_leaves(value))
            results = tuple(self._places(step.name))
            self.shapes |= {place: self.tensor(place).shape for place in results}
            self.links.append(Link(step, tuple(dict.fromkeys(sources)), results, folded, reads))

    def _modules(self, step: Step) -> list[nn.Module]:
        parts = step.target.parts if step.op in {"chain", "rewrite"} else [step]
        return [layer_at(self.net, part.target) for part in parts if part.op == "call_module"]

    def _reads(self, step: Step, modules: Sequence[nn.Module]) -> bool:
        if step.op == "get_attr":
            path, _, leaf = step.target.rpartition(".")
            return id(getattr(self.net.get_submodule(path), leaf)) in self._parameters
        return any(id(own) in self._parameters for module in modules for own in module.parameters())

    def _places(self, name: str) -> Iterator[Place]:
        """Tensors of a value through which derivatives pass."""
        if name in self._dependent:
            for i, leaf in enumerate(pytree.tree_leaves(self.values[name])):
                if isinstance(leaf, PerBranch) and leaf.tensor.is_floating_point():
                    yield name, i

    def _fold(self, step: Step) -> Folded | None:
        chain: Chain = step.target
        if chain.conv is None or chain.describes:
            return None
        if chain.norm is not None and id(module_at(self.net, chain.norm)) in self._wanted:
            return None
        if not joined.can_run(chain, self.net, *resolve(step.args, self.values)):
            return None
        norm, conv = joined.layers(chain, self.net)
        assert conv is not None  # noqa: S101 (for the type checker)
        return Folded(conv, norm) if folds_exactly(conv) else None

    def _drop_values(self) -> None:
        """Keep what passes need: what links take, and what ReLUs gave."""
        wanted = {ref.name for link in self.links for ref in refs(link.step)}
        wanted |= {link.step.name for link in self.links if link.folded and link.chain.relu}
        self.values = {name: value for name, value in self.values.items() if name in wanted}

    def nbytes(self) -> int:
        """Memory of the kept values, bytes."""
        leaves = pytree.tree_leaves(self.values)
        return sum((leaf.tensor if isinstance(leaf, PerBranch) else leaf).nbytes
                   for leaf in leaves if isinstance(leaf, (PerBranch, Tensor)))  # fmt: skip

    def tensor(self, place: Place) -> Tensor:
        """Value at a place."""
        leaf: PerBranch = pytree.tree_leaves(self.values[place[0]])[place[1]]
        return leaf.tensor

    def operands(self, link: Link) -> tuple[Tensor, Place | None, Place | None]:
        """Of a folded link: its input, the input's place and that of the other value of its sum, None if constant."""
        x, residual = link.step.args
        value = self.values[x.name]
        places = [(ref.name, 0) if ref is not None and ref.name in self._dependent else None for ref in (x, residual)]
        return value.tensor if isinstance(value, PerBranch) else value, places[0], places[1]

    def mask(self, link: Link) -> Tensor | None:
        """The value of a folded link that ends with a ReLU."""
        return self.tensor(link.results[0]) if link.chain.relu else None

    def again(self, link: Link, stand_in: Callable[[Place, Tensor], Tensor]) -> list[Tensor]:
        """Run a link that is not folded once more.

        Args:
            link: The link.
            stand_in: From a place and the value there to the tensor that takes its place.

        Returns:
            The tensors at the places of its result.
        """
        own = dict(self.values)
        for name in dict.fromkeys(name for name, _ in link.sources):
            leaves, spec = pytree.tree_flatten(self.values[name])
            for _, i in (place for place in link.sources if place[0] == name):
                leaves[i] = PerBranch(stand_in((name, i), leaves[i].tensor))
            own[name] = pytree.tree_unflatten(leaves, spec)
        value = pytree.tree_leaves(run_step(link.step, self.net, own, self.inputs, self.net.num_branches))
        return [value[i].tensor for _, i in link.results]

    def recorded(self, link: Link) -> Local:
        """Run a link that is not folded once more at fixed parameters, so that autograd records it."""
        sources: dict[Place, Tensor] = {}

        def leaf(place: Place, value: Tensor) -> Tensor:
            sources[place] = value.detach().requires_grad_()
            return sources[place]

        with torch.enable_grad(), self.replaced(lambda own: own.detach()):
            return Local(sources, self.again(link, leaf))

    def gradients(self) -> "Gradients":
        """An empty collection for one pass back."""
        return Gradients(self)

    def is_first_user(self, link: Link, place: Place) -> bool:
        """Whether no link before this one takes the value: its gradient is the last that a pass back adds."""
        return self._first_user[place] == link.step.name

    def rectified(self) -> dict[Place, Tensor]:
        """Values of folded links that end with a ReLU."""
        relus = [link for link in self.links if link.folded is not None and link.chain.relu]
        return {link.results[0]: self.tensor(link.results[0]) for link in relus}

    def replaced(self, replace: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Put other tensors in place of the network's for a while; buffers are copies."""
        parameters = {id(own) for own in self.net.parameters()}
        return replaced(self.net, lambda own: replace(own) if id(own) in parameters else own.detach().clone())


def _drops_derivatives(leaf: Any) -> bool:
    if isinstance(leaf, PerBranch):
        return leaf.tensor.is_complex()
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


class Gradients:
    """Gradients of values while a pass goes back; those of ReLUs are turned into those of what the ReLU takes."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._relus = sweep, sweep.rectified()
        self._sums: dict[Place, Tensor] = {}
        self._done: set[Place] = set()

    def add(self, place: Place, grad: Tensor) -> None:
        """Add a gradient."""
        known = self._sums.get(place)
        self._sums[place] = grad if known is None else known + grad

    def add_input_grad(self, link: Link, *parts: tuple[Tensor | None, Tensor | None]) -> None:
        """Add the gradients of a folded link's input.

        Args:
            link: The link.
            parts: Gradients of the convolution's result, each with the weights, None for the link's own.
        """
        x, place, _ = self._sweep.operands(link)
        assert link.folded is not None  # noqa: S101 (for the type checker)
        if place is None:
            return
        given = [(grad, weight) for grad, weight in parts if grad is not None]
        last = self._relus.get(place) if self._sweep.is_first_user(link, place) else None
        for i, (grad, weight) in enumerate(given, 1):
            mask = last if i == len(given) else None
            self._sums[place] = link.folded.input_grad(grad, x, self._sums.pop(place, None), mask, weight)
            if mask is not None:
                self._done.add(place)

    def pop(self, place: Place) -> Tensor | None:
        """The gradient at a place, once all that follows it has been passed; for a ReLU, of what it takes."""
        grad = self._sums.pop(place, None)
        if grad is None or place in self._done or place not in self._relus:
            return grad
        return torch.where(self._relus[place] <= 0, 0, grad)
