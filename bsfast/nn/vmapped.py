"""The honest fallback: a module that cannot be traced runs as ``torch.vmap`` of itself over the stacked tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bsfast.nn.attributes import attributes_of, refuse_changed_attributes
from bsfast.nn.stacked import StackedModule, mode_of, tensors_of


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
        stacked: Module whose parameters and buffers have axis 0 = M; buffers that the forward assigns are replaced.
        bones: Module of the original class with the same names; takes the modes of ``stacked``.
        args: Positional arguments; every tensor has axis 0 = M.
        kwargs: Named arguments, likewise.

    Returns:
        What the module returns, every tensor with axis 0 = M.

    Raises:
        ValueError: If the forward writes into its input or changes a Python attribute.
    """
    for path, module in bones.named_modules():
        module.training = mode_of(stacked, path)
    tensors = {name: tensor for name, tensor in tensors_of(stacked).items() if name in tensors_of(bones)}
    leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    # The module may view its input, which batch-last memory would not allow.
    own = [leaf.contiguous() if isinstance(leaf, Tensor) and not leaf[:1].is_contiguous() else leaf for leaf in leaves]
    axes = tuple(0 if isinstance(leaf, Tensor) else None for leaf in own)

    def call(given: dict[str, Tensor], *own: Any) -> tuple[Any, dict[str, Tensor]]:
        own_args, own_kwargs = torch.utils._pytree.tree_unflatten(list(own), spec)
        now = dict(given)  # functional_call puts assigned buffers here
        result = torch.func.functional_call(bones, now, own_args, own_kwargs)
        return result, {name: tensor for name, tensor in now.items() if tensor is not given[name]}

    eager = not torch.compiler.is_compiling()
    before, versions = attributes_of(bones) if eager else {}, _versions(own) if eager else []
    result, assigned = torch.vmap(call, in_dims=(0, *axes), randomness="different")(tensors, *own)
    if eager:
        if _versions(own) != versions:
            raise ValueError(f"{type(bones).__name__}: forward must not write into its input; use the out-of-place form")
        refuse_changed_attributes(before, attributes_of(bones))
    for name, tensor in assigned.items():
        path, _, leaf = name.rpartition(".")
        stacked.get_submodule(path)._buffers[leaf] = tensor
    return result


def _versions(leaves: Sequence[Any]) -> list[int]:
    """Count the writes into each tensor so far, where torch counts them."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
