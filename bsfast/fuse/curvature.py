"""Products with the Hessian of a fused network on one batch: forward over reverse, what no vector changes kept.

A product needs tangents of values and of gradients. Values and gradients themselves are computed once; with them a
product takes six convolutions a layer, three fewer than a dual pass, and no normalisation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor

from bsfast.fuse.program import Program
from bsfast.fuse.sweep import Gradients, Link, Local, Place, Sweep
from bsfast.fuse.values import expand
from bsfast.nn.stacked import StackedModule

Tangents = dict[Place, Tensor]


class _Fixed(NamedTuple):
    """What no vector changes: gradients of a link's results, and those of a folded link's weight and bias."""

    results: list[Tensor | None]
    folded: tuple[Tensor | None, Tensor | None]


class CurvatureSweep:
    """A fused network at one batch, to be multiplied with the Hessian of a function of its branches' outputs.

    Args:
        net: The fused network, in evaluation mode; its tensors are as before after every call.
        program: The program that it runs.
        tensors: The parameters in question.
        inputs: Tensors by argument name.

    Attributes:
        outputs: v_k(x), shape ``(M, N, ...)``, without gradients.
    """

    def __init__(self, net: StackedModule, program: Program, tensors: Sequence[Tensor], inputs: dict[str, Any]) -> None:
        self._net, self._tensors = net, tensors
        self._sweep = Sweep(net, program, tensors, inputs)
        self._fixed: dict[str, _Fixed] = {}
        self.outputs: Tensor = expand(self._sweep.result, net.num_branches).contiguous()

    @property
    def gains(self) -> bool:
        """Whether derivatives pass through all steps, and any runs as one kernel, so that this is worth while."""
        return self._sweep.complete and any(link.folded is not None for link in self._sweep.links)

    @property
    def nbytes(self) -> int:
        """Memory that it keeps, bytes, once gradients are known."""
        grads = [grad for fixed in self._fixed.values() for grad in fixed.results if grad is not None]
        return self._sweep.nbytes() + sum(grad.nbytes for grad in grads)

    def set_gradient(self, grad: Tensor) -> None:
        """Say what the gradient with respect to the outputs is, and pass it back.

        Args:
            grad: Shape of :attr:`outputs`.
        """
        grads = self._sweep.gradients()
        if self._sweep.output is not None:
            grads.add(self._sweep.output, grad)
        with torch.no_grad():
            for link in reversed(self._sweep.links):
                own = [grads.pop(place) for place in link.results]
                folded: tuple[Tensor | None, Tensor | None] = None, None
                if link.folded is None:
                    self._pass_value(link, own, grads)
                elif own[0] is not None:
                    x = self._pass_folded(link, own[0], grads, (own[0], None))
                    if link.reads:
                        folded = link.folded.weight_grad(x, own[0]), _over_samples(own[0])
                self._fixed[link.step.name] = _Fixed(own, folded)

    def _pass_value(self, link: Link, own: Sequence[Tensor | None], grads: Gradients) -> None:
        if not link.sources or all(grad is None for grad in own):
            return
        sources, results = self._sweep.recorded(link)
        pairs = [(y, g) for y, g in zip(results, own, strict=True) if g is not None and y.requires_grad]
        if pairs:
            outputs, seeds = zip(*pairs, strict=True)
            pulled = torch.autograd.grad(outputs, list(sources.values()), seeds, allow_unused=True)
            _add(grads, sources, pulled)

    def _pass_folded(self, link: Link, grad: Tensor | None, grads: Gradients, *parts: Any) -> Tensor:
        x, _, residual = self._sweep.operands(link)
        if residual is not None and grad is not None:
            grads.add(residual, grad)
        grads.add_input_grad(link, *parts)
        return x

    def product(self, vectors: Sequence[Tensor], seed: Callable[[Tensor], Tensor], *, curved: bool) -> list[Tensor]:
        """Multiply by the Hessian, or by a part of it.

        Args:
            vectors: Shaped as the parameters.
            seed: From the outputs' tangent to the tangent of the gradient with respect to them, both of the shape of
                :attr:`outputs`.
            curved: Whether the gradient of :meth:`set_gradient` is passed back through the network's own curvature;
                without it, only the seed is.

        Returns:
            Shaped as the parameters.
        """
        run = _Run(self._tensors, vectors)
        with torch.enable_grad(), forward.dual_level():
            duals = run.duals()
            with self._sweep.replaced(lambda own: duals.get(id(own), own.detach())):
                self._push(run)
            output, zero = self._sweep.output, torch.zeros_like(self.outputs)
            first = seed(zero if output is None else run.tangents.get(output, zero))
            self._pull(run, first.detach(), curved=curved)
        return [run.total[id(own)] for own in self._tensors]

    def _push(self, run: "_Run") -> None:
        for link in self._sweep.links:
            if link.folded is None:
                own = run.recorded[link.step.name] = self._record(link, run.tangents)
                for place, result in zip(link.results, own.results, strict=True):
                    tangent = forward.unpack_dual(result).tangent
                    if tangent is not None:
                        run.tangents[place] = tangent.detach()
                continue
            with torch.no_grad():
                weight, bias = run.folded[link.step.name] = link.folded.push(run.given) if link.reads else (None, None)
                x, *others = self._sweep.operands(link)
                moved, other = (None if at is None else run.tangents.get(at) for at in others)
                mask = self._sweep.mask(link)
                run.tangents[link.results[0]] = link.folded.tangent((x, moved), weight, bias, other, mask)

    def _record(self, link: Link, tangents: Tangents) -> Local:
        sources: dict[Place, Tensor] = {}

        def leaf(place: Place, value: Tensor) -> Tensor:
            sources[place] = value.detach().requires_grad_()
            tangent = tangents.get(place)
            return sources[place] if tangent is None else forward.make_dual(sources[place], tangent)

        return Local(sources, self._sweep.again(link, leaf))

    def _pull(self, run: "_Run", first: Tensor, *, curved: bool) -> None:
        grads = self._sweep.gradients()
        if self._sweep.output is not None:
            grads.add(self._sweep.output, first)
        for link in reversed(self._sweep.links):
            own = [grads.pop(place) for place in link.results]
            fixed = self._fixed[link.step.name] if curved else _Fixed([None] * len(own), (None, None))
            if link.folded is None:
                self._pull_local(run, run.recorded[link.step.name], fixed, own, grads)
            else:
                with torch.no_grad():
                    self._pull_folded(run, link, fixed, own[0], grads)

    def _pull_folded(self, run: "_Run", link: Link, fixed: _Fixed, own: Tensor | None, grads: Gradients) -> None:
        folded, value = link.folded, fixed.results[0]
        assert folded is not None  # noqa: S101 (for the type checker)
        weight, _ = run.folded[link.step.name]
        crossed = [(value, weight)] if value is not None and weight is not None else []
        x = self._pass_folded(link, own, grads, *crossed, (own, None))
        if not link.reads:
            return
        _, place, _ = self._sweep.operands(link)
        moved = None if place is None else run.tangents.get(place)
        terms = [folded.weight_grad(x, own)] if own is not None else []
        terms += [folded.weight_grad(moved, value)] if moved is not None and value is not None else []
        both = sum(terms[1:], terms[0]) if terms else None, None if own is None else _over_samples(own)
        for parameter, tangent in folded.pull(run.given, fixed.folded, both):
            run.add(parameter, tangent)

    def _pull_local(
        self, run: "_Run", local: Local, fixed: _Fixed, own: Sequence[Tensor | None], grads: Gradients
    ) -> None:
        three = zip(local.results, fixed.results, own, strict=True)
        used = [(y, g, t) for y, g, t in three if y.requires_grad and (g is not None or t is not None)]
        if not used:
            return
        zeros = [torch.zeros_like(y.detach()) for y, _, _ in used]
        pairs = zip(used, zeros, strict=True)
        duals = [forward.make_dual(zero if g is None else g, zero if t is None else t) for (_, g, t), zero in pairs]
        wanted = [*local.sources.values(), *run.leaves]
        pulled = torch.autograd.grad([y for y, _, _ in used], wanted, duals, allow_unused=True)
        moved = [None if grad is None else forward.unpack_dual(grad).tangent for grad in pulled]
        _add(grads, local.sources, moved[: len(local.sources)])
        for parameter, tangent in zip(self._tensors, moved[len(local.sources) :], strict=True):
            if tangent is not None:
                run.add(parameter, tangent.detach())


class _Run:
    """What one product computes on the way.

    Attributes:
        leaves: Copies of the parameters that autograd knows.
        tangents: Of values.
        folded: Tangents of weight and bias of folded links.
        recorded: The other links, in dual numbers.
        total: The result, by id of the parameter.
    """

    def __init__(self, tensors: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        self.tangents: Tangents = {}
        self.folded: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.recorded: dict[str, Local] = {}
        self.total = {id(tensor): torch.zeros_like(tensor) for tensor in tensors}
        self._vectors = {id(own): vector.contiguous() for own, vector in zip(tensors, vectors, strict=True)}
        self._ids = [id(tensor) for tensor in tensors]

    def duals(self) -> dict[int, Tensor]:
        """The parameters in dual numbers, by id."""
        pairs = zip(self._ids, self.leaves, strict=True)
        return {own: forward.make_dual(leaf, self._vectors[own]) for own, leaf in pairs}

    def given(self, parameter: Tensor) -> Tensor | None:
        """The tangent of a parameter, None if it is not among those in question."""
        return self._vectors.get(id(parameter))

    def add(self, parameter: Tensor, tangent: Tensor) -> None:
        """Add to the result, if the parameter is in question."""
        if id(parameter) in self.total:
            self.total[id(parameter)] += tangent


def _over_samples(grad: Tensor) -> Tensor:
    return grad.sum((1, 3, 4))


def _add(grads: Gradients, sources: dict[Place, Tensor], pulled: Sequence[Tensor | None]) -> None:
    for place, grad in zip(sources, pulled, strict=True):
        if grad is not None:
            grads.add(place, grad.detach())
