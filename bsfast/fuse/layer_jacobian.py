"""Gradients of a fused network's parameters for every sample, from one forward pass that keeps layers' inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsfast.fuse.program import Program, layer_at
from bsfast.fuse.sweep import Local, Sweep
from bsfast.fuse.values import PerBranch, expand
from bsfast.nn.per_sample import per_sample_grads
from bsfast.nn.stacked import StackedModule


class LayerJacobian:
    """The transposed Jacobian of every branch's output, a cotangent at a time.

    Valid where each sample's output depends on the layers' outputs of that sample only
    (:class:`bsfast.fuse.piecewise.Tail`).

    Args:
        net: The fused network; its tensors are as before afterwards.
        program: The program that it runs.
        layers: For each wanted parameter the path of the one layer that reads it.
        inputs: Tensors by argument name, shared by all branches.

    Attributes:
        outputs: v_k(x), shape ``(M, N, ...)``, without gradients.
        inputs: The layers' inputs by path, ``(M, N, ...)``, or ``(N, ...)`` where shared by all branches.
    """

    def __init__(self, net: StackedModule, program: Program, layers: dict[str, str], inputs: dict[str, Any]) -> None:
        self._names = layers
        self._layers = {path: layer_at(net, path) for path in dict.fromkeys(layers.values())}
        parameters = [net.get_parameter(name) for name in layers]
        self._sweep = Sweep(net, program, parameters, inputs, wanted=list(self._layers.values()))
        self.outputs: Tensor = expand(self._sweep.result, net.num_branches).contiguous()
        paths = {id(layer): path for path, layer in self._layers.items()}
        self._paths: dict[str, str] = {}  # of the layer that a link is, by the link's name
        self._shared: dict[str, bool] = {}
        self.inputs: dict[str, Tensor] = {}
        for link in self._sweep.links:
            if link.reads:
                conv = link.chain.conv if link.folded is not None else link.step.target
                path = self._paths[link.step.name] = paths[id(layer_at(net, conv or ""))]
                value = self._sweep.values[link.step.args[0].name]
                self._shared[path] = not isinstance(value, PerBranch)
                self.inputs[path] = value.tensor if isinstance(value, PerBranch) else value
        self._recorded = {
            link.step.name: self._sweep.recorded(link) if link.sources else Local({}, [])
            for link in self._sweep.links
            if link.folded is None
        }

    def output_grads(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Pull a cotangent back to the layers' outputs.

        Args:
            cotangent: Shape ``(N, ...)``, the same for all branches, or ``(M, N, ...)``.

        Returns:
            By path of the layer, ``(M, N, ...)``.
        """
        found = self._pull(cotangent)
        return {
            path: grad if scale is None else grad * scale[:, None, :, None, None]
            for path, (grad, scale) in found.items()
        }

    def _pull(self, cotangent: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The same, with what the gradients of each channel remain to be multiplied by, ``(M, C)``, or None."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        grads = self._sweep.gradients()
        if self._sweep.output is not None:
            grads.add(self._sweep.output, cotangent.expand_as(self.outputs))
        with torch.no_grad():
            for link in reversed(self._sweep.links):
                own = [grads.pop(place) for place in link.results]
                if link.step.name in self._paths:
                    place, scale = link.results[0], None if link.folded is None else link.folded.scale
                    grad = self.outputs.new_zeros(self._sweep.shapes[place]) if own[0] is None else own[0]
                    found[self._paths[link.step.name]] = grad, scale
                if link.folded is None:
                    self._pass(self._recorded[link.step.name], own, grads)
                elif own[0] is not None:
                    _, _, residual = self._sweep.operands(link)
                    if residual is not None:
                        grads.add(residual, own[0])
                    grads.add_input_grad(link, (own[0], None))
        return found

    def _pass(self, local: Local, own: Sequence[Tensor | None], grads: Any) -> None:
        pairs = [(result, grad) for result, grad in zip(local.results, own, strict=False)
                 if grad is not None and result.requires_grad]  # fmt: skip
        if not pairs or not local.sources:
            return
        results, seeds = zip(*pairs, strict=True)
        pulled = torch.autograd.grad(results, list(local.sources.values()), seeds, retain_graph=True, allow_unused=True)
        for place, grad in zip(local.sources, pulled, strict=True):
            if grad is not None:
                grads.add(place, grad)

    def __call__(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Gradients of ``sum(cotangent * v)`` for every sample.

        Args:
            cotangent: As for :meth:`output_grads`.

        Returns:
            By name of the parameter, ``(M, *shape, N)``.
        """
        by_path = {}
        with torch.no_grad():
            for path, (grad, scale) in self._pull(cotangent).items():
                leaves = [name.rpartition(".")[2] for name, own in self._names.items() if own == path]
                by_path[path] = per_sample_grads(
                    self._layers[path], self.inputs[path], grad, leaves, shared=self._shared[path]
                )
                if scale is not None:
                    for own in by_path[path].values():
                        own.mul_(scale.view(*scale.shape, *[1] * (own.dim() - 2)))
        return {name: by_path[path][name.rpartition(".")[2]] for name, path in self._names.items()}
