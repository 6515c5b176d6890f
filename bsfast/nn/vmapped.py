"""The honest fallback: a module that cannot be traced runs as ``torch.vmap`` of itself over the stacked tensors."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bsfast.nn.attributes import attributes_of, refuse_changed_attributes
from bsfast.nn.stacked import CALL_HOOKS, StackedModule, mode_of, replaced, tensors_of


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
        ValueError: If the forward writes into its input or changes a Python attribute, or an inner module of
            ``stacked`` has a hook, which would never be called.
    """
    for path, module in bones.named_modules():
        module.training = mode_of(stacked, path)
    named = dict(bones.named_parameters()) | dict(bones.named_buffers())  # tied ones once
    now = tensors_of(stacked)
    tensors = {name: now[name] for name in named}
    name_of = {id(tensor): name for name, tensor in named.items()}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    # The module may view its input, which batch-last memory would not allow.
    own = [leaf.contiguous() if isinstance(leaf, Tensor) and not leaf[:1].is_contiguous() else leaf for leaf in leaves]
    axes = tuple(0 if isinstance(leaf, Tensor) else None for leaf in own)
    returned: list[Any] = []

    def call(given: dict[str, Tensor], *own: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        own_args, own_kwargs = pytree.tree_unflatten(list(own), spec)
        with replaced(bones, lambda tensor: given[name_of[id(tensor)]]):
            results, returned[:] = _tensors_and_rest(bones(*own_args, **own_kwargs))
            assigned = {name: tensor for name, tensor in bones.named_buffers() if tensor is not given.get(name)}
        return results, assigned

    eager = not torch.compiler.is_compiling()
    if eager:
        _refuse_inner_hooks(stacked, bones)
    before, versions = attributes_of(bones) if eager else {}, _versions(own) if eager else []
    if runs_as(bones) == "loop":
        results, assigned = _loop(call, axes, tensors, own)
    else:
        with _RequiresGrad() if eager else nullcontext():
            results, assigned = torch.vmap(call, in_dims=(0, *axes), randomness="different")(tensors, *own)
    if eager:
        if _versions(own) != versions:
            raise ValueError(
                f"{type(bones).__name__}: forward must not write into its input; use the out-of-place form"
            )
        refuse_changed_attributes(before, attributes_of(bones))
    for name, tensor in assigned.items():
        path, _, leaf = name.rpartition(".")
        stacked.get_submodule(path)._buffers[leaf] = tensor
    return _with_tensors(returned, results)


def _refuse_inner_hooks(stacked: nn.Module, bones: nn.Module) -> None:
    for path, module in stacked.named_modules():
        if path and any(getattr(module, hooks) for hooks in CALL_HOOKS):
            raise ValueError(
                f"Branched: hooks must not be inside what runs by vmap, got one on {path!r} of "
                f"{type(bones).__name__}, which would never be called"
            )


class _RequiresGrad(TorchFunctionMode):
    """Inside vmap, ``requires_grad`` is that of what is mapped; stock vmap always says False."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            (tensor,) = args
            while torch._C._functorch.is_batchedtensor(tensor):
                tensor = torch._C._functorch.get_unwrapped(tensor)
            return tensor.requires_grad
        return function(*args, **(kwargs or {}))


# LSTMs keep lists of their own weights; attention has a fast path without gradients, which vmap would misjudge.
_LOOPED = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)


def runs_as(bones: nn.Module) -> str:
    """Say how a module runs: by ``vmap``, or by a ``loop`` over branches if it holds an LSTM, attention or the like."""
    return "loop" if any(isinstance(module, _LOOPED) for module in bones.modules()) else "vmap"


def _loop(call: Callable[..., Any], axes: tuple[int | None, ...], tensors: dict[str, Tensor], own: list[Any]) -> Any:
    branches = next(leaf.shape[0] for leaf in (*tensors.values(), *own) if isinstance(leaf, Tensor))
    results = []
    for k in range(branches):
        given = {name: tensor[k] for name, tensor in tensors.items()}
        results.append(call(given, *(leaf if axis is None else leaf[k] for leaf, axis in zip(own, axes, strict=True))))
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *results)


def _tensors_and_rest(result: Any) -> tuple[list[Tensor], list[Any]]:
    """Split a nested result into its tensors, and structure and other values (None, say), which vmap cannot return."""
    leaves, spec = pytree.tree_flatten(result)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, [spec, [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]]


def _with_tensors(rest: list[Any], tensors: list[Tensor]) -> Any:
    spec, others = rest
    left = iter(tensors)
    return pytree.tree_unflatten([next(left) if other is None else other[0] for other in others], spec)


def _versions(leaves: Sequence[Any]) -> list[int]:
    """Count the writes into each tensor so far, where torch counts them."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
