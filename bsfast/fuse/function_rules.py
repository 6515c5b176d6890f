"""Rules for functions in forward code: how each kind runs on values of M branches.

A rule is called as ``rule(function, args, kwargs, branches)`` with :class:`PerBranch` values among the arguments. What
has no rule runs as ``torch.vmap`` of the function.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast.fuse.values import PerBranch, aligned, dtype_of, expand, vmapped, wrap
from bsfast.nn.functional import over_planes, over_samples

BY_CHANNEL_GROUPS = {F.pixel_shuffle, F.pixel_unshuffle}  # without samples, branches would be channels to them
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Rule = Callable[[Callable[..., Any], Args, Kwargs, int], Any]


def pointwise(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """Elementwise with broadcasting."""
    kwargs.pop("memory_format", None)
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, (PerBranch, Tensor))]
    numbers = {dtype_of(v) for v in tensors if isinstance(v, PerBranch) and v.rank == 0}
    if (numbers and len({dtype_of(v) for v in tensors}) > 1) or (function is torch.where and len(tensors) == 1):
        return vmapped(function, args, kwargs, branches)  # tensors of rank 0 do not promote others, ours has the axis M
    values = aligned([*args, *kwargs.values()])
    return wrap(function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True))))


def as_written(result: Tensor, written: Tensor) -> Tensor:
    """Give the result of an operation the type that writing it into a tensor would give it."""
    if result.shape != written.shape:
        raise ValueError(f"an in-place operation must keep the shape {tuple(written.shape)}, got {tuple(result.shape)}")
    if result.dtype == written.dtype:
        return result
    if not torch.can_cast(result.dtype, written.dtype):
        raise TypeError(f"an in-place operation must give {written.dtype}, got {result.dtype}")
    return result.to(written.dtype)


class CloneThen:
    """An in-place method without an out-of-place twin, such as ``uniform_``, applied to a copy."""

    def __init__(self, method: str) -> None:
        self.__name__ = method
        self.method = method

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply to a clone."""
        return getattr(x.clone(), self.method)(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CloneThen) and other.method == self.method

    def __hash__(self) -> int:
        return hash(self.method)


def written(function: Callable[..., Any], args: Args, _: Kwargs, branches: int) -> Any:
    """:func:`as_written` of what each branch sees."""
    result, before = args
    if not isinstance(before, PerBranch):
        before = PerBranch(before.expand(branches, *before.shape))
    if not isinstance(result, PerBranch):
        return PerBranch(function(expand(result, branches), before.tensor))
    return PerBranch(function(result.tensor, before.tensor))


def samplewise(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """Every sample by itself: branches are more samples."""
    x, *rest = args
    if not isinstance(x, PerBranch) or x.rank < (4 if function in BY_CHANNEL_GROUPS else 2):
        return vmapped(function, args, kwargs, branches)
    return wrap(over_samples(lambda t: function(t, *rest, **kwargs), x.tensor))


def planewise(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """Every channel of every image by itself; what is no batch of images, only sample by sample."""
    x, *rest = args
    if not isinstance(x, PerBranch) or x.rank != 4:
        return samplewise(function, args, kwargs, branches)
    return wrap(over_planes(lambda t: function(t, *rest, **kwargs), x.tensor))


def pad(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """Padding of the last axes; of the sample axis only by vmap."""
    widths = args[1] if len(args) > 1 else kwargs["pad"]
    if not isinstance(args[0], PerBranch) or len(widths) >= 2 * args[0].rank:
        return vmapped(function, args, kwargs, branches)
    return (planewise if len(widths) <= 4 else samplewise)(function, args, kwargs, branches)


def cast(function: Callable[..., Any], args: Args, kwargs: Kwargs, _: int) -> Any:
    """Change of dtype or device, perhaps to another value's."""
    kwargs.pop("memory_format", None)
    x, *rest = args
    others = [arg.tensor if isinstance(arg, PerBranch) else arg for arg in rest]
    others_by_name = {name: arg.tensor if isinstance(arg, PerBranch) else arg for name, arg in kwargs.items()}
    if isinstance(x, PerBranch):
        return PerBranch(function(x.tensor, *others, **others_by_name))
    return function(x, *others, **others_by_name)


def unchanged(_: Callable[..., Any], args: Args, __: Kwargs, ___: int) -> Any:
    """A change of memory order only; ours is the fused network's own."""
    return args[0]


def _shift(dim: int, rank: int) -> int:
    """Axis of the stacked tensor for an axis of one branch; never the branch axis."""
    if not -rank <= dim < rank:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})")
    return dim % rank + 1


def _shift_all(dims: Any, rank: int) -> Any:
    return _shift(dims, rank) if isinstance(dims, int) else tuple(_shift(dim, rank) for dim in dims)


def over_axes(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """Reductions and the like whose second argument names axes; without it, all axes of a branch."""
    x, *rest = args
    given = rest.pop(0) if rest else kwargs.get("dim")
    unusual = (
        isinstance(given, (bool, str, torch.dtype))
        or "axis" in kwargs
        or (given is None and "softmax" in str(function))
    )
    if not isinstance(x, PerBranch) or rest or unusual or x.rank == 0:
        return vmapped(function, args, kwargs, branches)
    all_axes = given is None or (isinstance(given, (tuple, list)) and not given)
    dims = tuple(range(1, x.tensor.dim())) if all_axes else _shift_all(given, x.rank)
    return PerBranch(function(x.tensor, **{**kwargs, "dim": dims}))


def axes_from(position: int, default: tuple[int, ...] = (), new: int = 0) -> Rule:
    """Rule for a function whose integer arguments from ``position`` on are axes; it adds ``new`` axes."""

    def rule(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
        if not isinstance(args[0], PerBranch) or kwargs or args[0].rank == 0:
            return vmapped(function, args, kwargs, branches)
        dims = args[position:] or default
        return wrap(function(args[0].tensor, *args[1:position], *(_shift(dim, args[0].rank + new) for dim in dims)))

    return rule


def permute(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """Reorder the axes of each branch."""
    x, *dims = args
    if kwargs or not isinstance(x, PerBranch):
        return vmapped(function, args, kwargs, branches)
    order = dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims
    return PerBranch(x.tensor.permute(0, *_shift_all(order, x.rank)))


def reshape(_: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """``view`` and ``reshape``, to sizes or to another value's: batch-last memory may need a copy, so all reshape."""
    shape: Any
    x, *shape = [*args, *kwargs.values()]
    if len(shape) == 1 and isinstance(shape[0], (PerBranch, Tensor)):
        shape = shape[0].tensor.shape[1:] if isinstance(shape[0], PerBranch) else shape[0].shape
    elif len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = list(shape[0])
    if any(isinstance(size, torch.dtype) for size in shape):
        return vmapped(Tensor.view, args, kwargs, branches)
    return PerBranch(x.tensor.reshape(branches, *shape)) if isinstance(x, PerBranch) else x.reshape(shape)


def flatten(_: Callable[..., Any], args: Args, kwargs: Kwargs, __: int) -> Any:
    """Merge neighbouring axes of each branch."""
    x, *ends = args
    start = ends[0] if ends else kwargs.get("start_dim", 0)
    end = ends[1] if len(ends) > 1 else kwargs.get("end_dim", -1)
    if x.rank == 0:
        return PerBranch(x.tensor.unsqueeze(1))
    return PerBranch(x.tensor.flatten(_shift(start, x.rank), _shift(end, x.rank)))


def size(_: Callable[..., Any], args: Args, kwargs: Kwargs, __: int) -> Any:
    """Shape that one branch sees."""
    shape = args[0].tensor.shape[1:]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return shape if dim is None else shape[dim]


def attribute(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """``x.shape``, ``x.dtype``, ``x.device``, ..."""
    x, name = args
    if name == "shape":
        return x.tensor.shape[1:]
    if name == "ndim":
        return x.rank
    if name in {"dtype", "device", "is_cuda", "layout"}:
        return getattr(x.tensor, name)
    return vmapped(function, args, kwargs, branches)


def item(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """``x[...]``: of a tensor, or of a tuple or dict of values."""
    x, index = args
    if not isinstance(x, PerBranch):
        return vmapped(function, args, kwargs, branches) if isinstance(x, Tensor) else x[index]
    entries = index if isinstance(index, tuple) else (index,)
    if all(entry is None or entry is Ellipsis or isinstance(entry, (int, slice)) for entry in entries):
        return PerBranch(x.tensor[(slice(None), *entries)])
    return vmapped(function, args, kwargs, branches)


def join(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
    """``cat`` and ``stack``."""
    tensors = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    parts = expand(list(tensors), branches)
    if kwargs.keys() - {"tensors", "dim"} or any(part.dim() != parts[0].dim() for part in parts):
        return vmapped(function, args, kwargs, branches)
    return PerBranch(function(parts, _shift(dim, parts[0].dim() - (function is not torch.stack))))


def rank(_: Callable[..., Any], args: Args, __: Kwargs, ___: int) -> int:
    """``x.dim()`` of one branch."""
    return int(args[0].rank)


def numel(_: Callable[..., Any], args: Args, __: Kwargs, branches: int) -> int:
    """Elements that one branch sees."""
    return int(args[0].tensor.numel() // branches)


def own(layer: Callable[..., Any], stacked: tuple[str, ...], takes_shared: bool = False) -> Rule:
    """Rule for a layer in its functional form: our layer if its parameters are per-branch and its input is too.

    Args:
        layer: Function of :mod:`bsfast.nn.functional` with the parameters of the stock one, in its order.
        stacked: Names of the arguments that must be per-branch or None.
        takes_shared: Whether the layer takes an input shared by all branches.

    Returns:
        The rule.
    """
    names = list(inspect.signature(layer).parameters)
    names = names[: names.index("shared")] if takes_shared else names

    def rule(function: Callable[..., Any], args: Args, kwargs: Kwargs, branches: int) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        x = given["x"]
        ready = all(given.get(name) is None or isinstance(given[name], PerBranch) for name in stacked)
        if not ready or set(given) - set(names) or len(args) > len(names):
            return vmapped(function, args, kwargs, branches)
        plain = {name: value.tensor if isinstance(value, PerBranch) else value for name, value in given.items()}
        if isinstance(x, PerBranch):
            return PerBranch(layer(**plain))
        if takes_shared:
            return PerBranch(layer(**plain, shared=True))
        return PerBranch(layer(**{**plain, "x": expand(x, branches)}))

    return rule
