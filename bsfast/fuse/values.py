"""Values of the fused graph: tensors with a branch axis, and plain ones that all branches share."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class PerBranch:
    """A tensor whose axis 0 is the branch axis; a bare tensor in the graph is shared by all branches.

    Attributes:
        tensor: The tensor.
        moments: Mean and variance of its channels, if what computed it has them.
    """

    __slots__ = ("moments", "tensor")

    def __init__(self, tensor: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> None:
        self.tensor = tensor
        self.moments = moments

    @property
    def rank(self) -> int:
        """Number of axes that one branch sees."""
        return self.tensor.dim() - 1


def leaves_of(value: Any) -> list[Any]:
    """Flatten nested arguments."""
    return pytree.tree_leaves(value)


def any_per_branch(value: Any) -> bool:
    """Say whether nested arguments hold a per-branch value."""
    return any(isinstance(leaf, PerBranch) for leaf in leaves_of(value))


def dtype_of(value: Any) -> torch.dtype:
    """Dtype of a value."""
    dtype: torch.dtype = (value.tensor if isinstance(value, PerBranch) else value).dtype
    return dtype


def wrap(value: Any) -> Any:
    """Mark every tensor of a nested result as per-branch."""
    return pytree.tree_map(lambda leaf: PerBranch(leaf) if isinstance(leaf, Tensor) else leaf, value)


def expand(value: Any, branches: int) -> Any:
    """Unwrap nested arguments; shared tensors get a branch axis of stride 0."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, PerBranch):
            return leaf.tensor
        return leaf.expand(branches, *leaf.shape) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(one, value)


def aligned(values: Iterable[Any]) -> list[Any]:
    """Unwrap values for broadcasting: per-branch tensors of lower rank get axes of length 1 after the branch axis."""
    values = list(values)
    ranks = [v.rank if isinstance(v, PerBranch) else v.dim() for v in values if isinstance(v, (PerBranch, Tensor))]
    highest = max(ranks, default=0)

    def one(value: Any) -> Any:
        if not isinstance(value, PerBranch):
            return value
        missing = highest - value.rank
        return value.tensor[(slice(None), *[None] * missing)] if missing else value.tensor

    return [one(value) for value in values]


def vmapped(function: Callable[..., Any], args: Any, kwargs: Any, branches: int) -> Any:
    """Call a function of one branch for all branches by ``torch.vmap``; random numbers differ between branches."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batched = [leaf.tensor for leaf in leaves if isinstance(leaf, PerBranch)]

    def call(_: Tensor, *own: Tensor) -> Any:
        left = iter(own)
        values = [next(left) if isinstance(leaf, PerBranch) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(values, spec)
        return function(*own_args, **own_kwargs)

    # The first argument only carries the number of branches, for functions that draw random numbers from nothing.
    carrier = torch.empty(branches, 0)
    return wrap(torch.vmap(call, randomness="different")(carrier, *batched))
