"""The honest fallback: a module that cannot be traced runs as ``torch.vmap`` of itself over the stacked tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bsfast.nn.stacked import StackedModule, tensors_of


class Vmapped(StackedModule):
    """M modules of any class, run by ``torch.vmap`` of one; random numbers differ between branches."""

    @classmethod
    def around(cls, stacked: nn.Module, skeletons: Sequence[nn.Module]) -> "Vmapped":
        """Run modules whose tensors are stacked already; parameters stay the same objects, so optimizers keep them.

        Args:
            stacked: Module tree whose parameters and buffers have axis 0 = M.
            skeletons: The M modules without data.

        Returns:
            The module that runs them.
        """
        runner = cls()
        runner.num_branches, runner._skeletons = len(skeletons), tuple(skeletons)
        runner._modules.update(stacked._modules)
        runner._parameters.update(stacked._parameters)
        runner._buffers.update(stacked._buffers)
        runner._non_persistent_buffers_set |= stacked._non_persistent_buffers_set
        runner.training = stacked.training
        return runner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module on arguments whose tensors are all ``(M, ...)``."""
        return call_vmapped(self, self.settings, args, kwargs)


def call_vmapped(stacked: nn.Module, bones: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``bones`` (a module without data) once per branch, with the tensors of ``stacked``, under ``torch.vmap``.

    Args:
        stacked: Module whose parameters and buffers have axis 0 = M.
        bones: Module of the original class with the same names.
        args: Positional arguments; every tensor has axis 0 = M.
        kwargs: Named arguments, likewise.

    Returns:
        What the module returns, every tensor with axis 0 = M.
    """
    bones.train(stacked.training)
    leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    axes = tuple(0 if isinstance(leaf, Tensor) else None for leaf in leaves)

    def call(tensors: dict[str, Tensor], *own: Any) -> Any:
        own_args, own_kwargs = torch.utils._pytree.tree_unflatten(list(own), spec)
        return torch.func.functional_call(bones, tensors, own_args, own_kwargs)

    return torch.vmap(call, in_dims=(0, *axes), randomness="different")(tensors_of(stacked), *leaves)
