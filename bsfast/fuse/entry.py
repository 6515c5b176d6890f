"""``fuse`` and ``unfuse``: from M modules to a :class:`~bsfast.Branched` and back."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from bsfast.fuse import compare, supported
from bsfast.fuse.branched import Branched


def fuse(branches: Sequence[nn.Module] | Callable[[], nn.Module], num_branches: int | None = None) -> Branched:
    """Fuse M modules of one architecture into one that computes them together.

    ``fuse(branches)(x)`` equals ``sum(branch(x) for branch in branches)``, and ``fuse(branches).branch_outputs(x)``
    equals ``torch.stack([branch(x) for branch in branches])``.

    Args:
        branches: M modules; they are copied and stay usable. Or a callable that makes one, called ``num_branches``
            times.
        num_branches: M, with a callable only.

    Returns:
        The fused module, in the branches' mode, on their device.

    Raises:
        TypeError: If ``branches`` is neither modules nor a callable.
        ValueError: If the branches differ in anything but the values of their tensors (the message names the first
            difference), or cannot be fused faithfully; for instance hooks, parametrizations, tensors that share memory,
            control flow on data.

    Example:
        >>> import torch
        >>> net = fuse([nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(4)])
        >>> net(torch.ones(5, 3)).shape, net.branch_outputs(torch.ones(5, 3)).shape
        (torch.Size([5, 2]), torch.Size([4, 5, 2]))
    """  # noqa: DOC502 (raised by the checks)
    modules = _make_branches(branches, num_branches)
    for k, branch in enumerate(modules):
        supported.check_supported(branch, k)
    compare.check_alike(modules)
    supported.check_memory(modules)
    return Branched.from_branches(modules)


def unfuse(net: Branched) -> list[nn.Module]:
    """Return M plain modules with the original ``state_dict`` keys and the fused network's values, bit for bit.

    Args:
        net: Made by :func:`fuse`.

    Returns:
        Copies; changing them does not change ``net``.

    Raises:
        TypeError: If ``net`` is not a fused network.
        ValueError: If a tensor that it was made with is gone, because of a parametrization for instance.
    """  # noqa: DOC502 (raised by to_branches)
    if not isinstance(net, Branched):
        raise TypeError(f"unfuse: net must be a bsfast.Branched, got {type(net).__name__}")
    return net.to_branches()


def _make_branches(branches: Any, num_branches: int | None) -> list[nn.Module]:
    if callable(branches) and not isinstance(branches, nn.Module):
        if not isinstance(num_branches, int) or isinstance(num_branches, bool) or num_branches < 1:
            raise ValueError(f"fuse: num_branches must be a positive int with a callable, got {num_branches!r}")
        branches = [branches() for _ in range(num_branches)]
    elif num_branches is not None:
        raise ValueError(f"fuse: num_branches must be left out with a list of modules, got {num_branches!r}")
    if not isinstance(branches, (Sequence, nn.ModuleList)):
        raise TypeError(f"fuse: branches must be a list of modules or a callable, got one {type(branches).__name__}")
    modules = list(branches)
    if not modules:
        raise ValueError("fuse: branches must hold at least one module, got an empty list")
    for k, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"fuse: branches must be torch.nn.Modules, got {type(module).__name__} at index {k}")
    return modules
