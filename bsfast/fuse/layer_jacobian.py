"""Gradients of a fused network's parameters for every sample, from one forward pass that keeps layers' inputs."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bsfast.fuse.program import layer_at
from bsfast.nn.per_sample import per_sample_grads
from bsfast.nn.stacked import StackedModule, replaced


class LayerJacobian:
    """The transposed Jacobian of every branch's output, a cotangent at a time.

    Valid where each sample's output depends on the layers' outputs of that sample only
    (:class:`bsfast.fuse.piecewise.Tail`).

    Args:
        net: The fused network; its tensors are as before afterwards.
        layers: For each wanted parameter the path of the one layer that reads it.
        inputs: What one branch takes, shared by all branches.

    Attributes:
        outputs: v_k(x), shape ``(M, N, ...)``, without gradients.
        inputs: The layers' inputs by path, ``(M, N, ...)``, or ``(N, ...)`` where shared by all branches.
    """

    def __init__(self, net: StackedModule, layers: dict[str, str], inputs: Sequence[Any]) -> None:
        self._names = layers
        self._layers = {path: layer_at(net, path) for path in dict.fromkeys(layers.values())}
        self._results: dict[str, Tensor] = {}
        self._shared: dict[str, bool] = {}
        self.inputs: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(replaced(net, _without_gradient))
            for path, layer in self._layers.items():
                handle = layer.register_forward_hook(self._keep(path), with_kwargs=True)
                stack.callback(handle.remove)
            self._outputs: Tensor = net.branch_outputs(*inputs)  # type: ignore[operator]
        self.outputs = self._outputs.detach()

    def _keep(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor:
            self.inputs[path], self._shared[path] = args[0].detach(), bool(kwargs.get("shared", False))
            # Nothing before the first wanted layer needs a graph.
            self._results[path] = result if result.requires_grad else result.detach().requires_grad_()
            return self._results[path]

        return hook

    def output_grads(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Pull a cotangent back to the layers' outputs.

        Args:
            cotangent: Shape ``(N, ...)``, the same for all branches, or ``(M, N, ...)``.

        Returns:
            By path of the layer, ``(M, N, ...)``.
        """
        seed = cotangent.expand_as(self._outputs)
        if not self._outputs.requires_grad:
            return {path: torch.zeros_like(z) for path, z in self._results.items()}
        results = list(self._results.values())
        grads = torch.autograd.grad(self._outputs, results, seed, retain_graph=True, materialize_grads=True)
        return dict(zip(self._results, grads, strict=True))

    def __call__(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Gradients of ``sum(cotangent * v)`` for every sample.

        Args:
            cotangent: As for :meth:`output_grads`.

        Returns:
            By name of the parameter, ``(M, *shape, N)``.
        """
        by_path = {}
        with torch.no_grad():
            for path, grad in self.output_grads(cotangent).items():
                leaves = [name.rpartition(".")[2] for name, own in self._names.items() if own == path]
                by_path[path] = per_sample_grads(
                    self._layers[path], self.inputs[path], grad, leaves, shared=self._shared[path]
                )
        return {name: by_path[path][name.rpartition(".")[2]] for name, path in self._names.items()}


def _without_gradient(tensor: Tensor) -> Tensor:
    """A parameter without gradient, and a buffer of its own that forward code may write into."""
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
