"""Parameters of M branches as vectors: which tensors belong to which branch, and the forms a vector may have.

Flat vectors are branch-major: all of branch 0 first, in each branch the parameters in the order of their names here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Spec = str | Sequence[str] | Mapping[str, Tensor] | None


class BranchParameters:
    """The chosen parameters of every branch of a net.

    A net either has stacked parameters, axis 0 = M, and the attribute ``num_branches``, as :class:`bsfast.Branched`;
    or a ``torch.nn.ModuleList`` named ``branches``, as :class:`bsfast.reference.ReferenceBranched`.

    Args:
        net: The net.
        chosen: Names of parameters or of modules, relative to a branch; a dictionary's keys; None for all that require
            gradients.

    Attributes:
        names: Names in order; relative to a branch.
        tensors: The net's own tensors: one a name if stacked, else those of branch 0, of branch 1, ...
        stacked: Whether axis 0 is the branch axis.
        num_branches: M.
        sizes: Number of elements P_k of every branch.
        shapes: Shapes of one branch's parameters, for every branch.
    """

    def __init__(self, net: nn.Module, chosen: Spec = None) -> None:
        self.stacked = hasattr(net, "num_branches")
        branches = getattr(net, "branches", None)
        if not callable(getattr(net, "branch_outputs", None)) or not (
            self.stacked or isinstance(branches, nn.ModuleList)
        ):
            raise TypeError(
                "hessian: net must have branch_outputs and stacked parameters or a ModuleList of branches, as "
                f"bsfast.Branched and bsfast.reference.ReferenceBranched have, got {type(net).__name__}"
            )
        own = [net] if self.stacked else list(branches)  # type: ignore[arg-type]
        by_name = [dict(module.named_parameters(remove_duplicate=False)) for module in own]
        self.names = _chosen_names(by_name[0], chosen)
        for k, found in enumerate(by_name):
            missing = [name for name in self.names if name not in found]
            if missing:
                raise ValueError(f"hessian: params must be in every branch, got none named {missing} in branch {k}")
        self.tensors = [found[name] for found in by_name for name in self.names]
        if len({id(tensor) for tensor in self.tensors}) < len(self.tensors):
            raise ValueError("hessian: branches must not share parameters, got a tensor of several branches")
        kinds = {(tensor.dtype, tensor.device) for tensor in self.tensors}
        if len(kinds) > 1:
            raise ValueError(f"hessian: params must have one dtype and device, got {sorted(map(str, kinds))}")
        self.dtype, self.device = self.tensors[0].dtype, self.tensors[0].device
        if not self.dtype.is_floating_point:
            raise TypeError(f"hessian: params must be floating-point, got {self.dtype}")
        if self.stacked:
            self.num_branches = int(net.num_branches)  # type: ignore[arg-type]
            self.shapes = [[tuple(tensor.shape[1:]) for tensor in self.tensors]] * self.num_branches
        else:
            self.num_branches = len(own)
            count = len(self.names)
            self.shapes = [
                [tuple(tensor.shape) for tensor in self.tensors[k * count : (k + 1) * count]] for k in range(len(own))
            ]
        self.sizes = [sum(torch.Size(shape).numel() for shape in shapes) for shapes in self.shapes]

    def check_present(self, net: nn.Module) -> None:
        """Check that the tensors are still the net's, and of the same kind.

        Args:
            net: The net.

        Raises:
            ValueError: If they are not.
        """
        present = {id(tensor) for tensor in net.parameters()}
        if any(id(tensor) not in present for tensor in self.tensors):
            raise ValueError(
                "hessian: the net must keep the parameters that were chosen, got a net with others in their place, as "
                "load_state_dict(assign=True) puts them there; choose them anew"
            )
        kinds = {(tensor.dtype, tensor.device) for tensor in self.tensors}
        if kinds != {(self.dtype, self.device)}:
            raise ValueError(
                f"hessian: the net must stay in {self.dtype} on {self.device}, got {sorted(map(str, kinds))}; choose "
                "the parameters anew"
            )

    @property
    def total(self) -> int:
        """D, the sum of all P_k."""
        return sum(self.sizes)

    @property
    def equal(self) -> bool:
        """Whether all branches have the same shapes, so that per-branch forms ``(M, P)`` exist."""
        return all(shapes == self.shapes[0] for shapes in self.shapes)

    def size(self, what: str) -> int:
        """P, which all branches must share for ``what``.

        Args:
            what: Name for the error.

        Returns:
            P.

        Raises:
            ValueError: If branches differ.
        """
        if not self.equal:
            raise ValueError(f"hessian: {what} must have branches of equal shapes, got P_k={self.sizes}")
        return self.sizes[0]

    def slices(self) -> list[slice]:
        """Where each branch is in a flat vector."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat vector ``(D,)`` into tensors shaped as :attr:`tensors`."""
        if self.stacked:
            parts = flat.view(self.num_branches, -1).split([torch.Size(s).numel() for s in self.shapes[0]], 1)
            return [part.reshape(own.shape) for part, own in zip(parts, self.tensors, strict=True)]
        parts = flat.split([tensor.numel() for tensor in self.tensors])
        return [part.view(own.shape) for part, own in zip(parts, self.tensors, strict=True)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Put tensors shaped as :attr:`tensors` into a flat vector ``(D,)``."""
        if self.stacked:
            return torch.cat([tensor.reshape(self.num_branches, -1) for tensor in tensors], 1).flatten()
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def flat_from(self, vector: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Read a vector or matrix in any form.

        Args:
            vector: ``(D,)`` or ``(D, K)``; per branch ``(M, P)`` or ``(M, P, K)``; or a dictionary from names to
                ``(M, *shape)`` or ``(M, *shape, K)``.

        Returns:
            Columns ``(D, K)``, and a function that gives columns the form of ``vector``.

        Raises:
            TypeError: If the dtype or device is not that of the parameters.
            ValueError: If the shape fits no form.
        """
        if isinstance(vector, Mapping):
            return self._from_mapping(vector)
        if not isinstance(vector, Tensor):
            raise TypeError(f"hessian: a vector must be a tensor or a dictionary, got {type(vector).__name__}")
        self._check_kind("a vector", vector)
        shape, form = tuple(vector.shape), "(D,) or (D, K)"
        if vector.dim() in {1, 2} and shape[0] == self.total:
            return vector.reshape(self.total, -1), lambda columns: columns.reshape(self.total, *shape[1:])
        if self.equal:
            batch = (self.num_branches, self.sizes[0])
            form = f"{form}, (M, P)={batch} or (M, P, K)"
            if vector.dim() in {2, 3} and shape[:2] == batch:
                return vector.reshape(self.total, -1), lambda columns: columns.reshape(*batch, *shape[2:])
        raise ValueError(f"hessian: a vector must have shape {form} with D={self.total}, got {shape}")

    def _check_kind(self, name: str, value: Tensor) -> None:
        if (value.dtype, value.device) != (self.dtype, self.device):
            raise TypeError(
                f"hessian: {name} must have the parameters' dtype and device ({self.dtype}, {self.device}), got "
                f"({value.dtype}, {value.device})"
            )

    def _from_mapping(self, vector: Mapping[str, Tensor]) -> tuple[Tensor, Callable[[Tensor], Any]]:
        self.size("a dictionary")
        if set(vector) != set(self.names):
            raise ValueError(f"hessian: a dictionary must have the keys {list(self.names)}, got {sorted(vector)}")
        parts, counts = [], set()
        for name, shape in zip(self.names, self.shapes[0], strict=True):
            full, value = (self.num_branches, *shape), vector[name]
            if tuple(value.shape[: len(full)]) != full or value.dim() > len(full) + 1:
                raise ValueError(f"hessian: {name} must have shape {full} or {full} and K, got {tuple(value.shape)}")
            self._check_kind(name, value)
            counts.add(tuple(value.shape[len(full) :]))
            parts.append(value.reshape(self.num_branches, torch.Size(shape).numel(), -1))
        if len(counts) > 1:
            raise ValueError(f"hessian: a dictionary must have one number of columns, got {sorted(counts)}")
        last = counts.pop()

        def back(columns: Tensor) -> dict[str, Tensor]:
            per_branch = columns.view(self.num_branches, self.sizes[0], -1)
            cut = per_branch.split([torch.Size(shape).numel() for shape in self.shapes[0]], 1)
            named = zip(self.names, self.shapes[0], cut, strict=True)
            return {name: part.reshape(self.num_branches, *shape, *last) for name, shape, part in named}

        return torch.cat(parts, 1).flatten(0, 1), back


def _chosen_names(found: Mapping[str, Tensor], chosen: Spec) -> tuple[str, ...]:
    if chosen is None:
        wanted = [name for name, tensor in found.items() if tensor.requires_grad]
        if not wanted:
            raise ValueError("hessian: net must have parameters that require gradients, got none")
    else:
        entries = [chosen] if isinstance(chosen, str) else list(chosen)
        if not entries:
            raise ValueError("hessian: params must name a parameter or module, or be None for all, got no names")
        wanted = []
        for entry in entries:
            inside = [name for name in found if name == entry or name.startswith(f"{entry}.")]
            if not inside:
                raise ValueError(f"hessian: params must name parameters or modules of a branch, got {entry!r}; there "
                                 f"are {', '.join(found)}")  # fmt: skip
            wanted += inside
    unique: dict[int, str] = {}
    for name in wanted:
        unique.setdefault(id(found[name]), name)  # a tied tensor counts once
    return tuple(dict.fromkeys(unique.values()))


@contextmanager
def substituted(net: nn.Module, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Put other tensors in place of some parameters for a while; the others lose their gradient, buffers are copies.

    Args:
        net: Module; everything is put back at the end, whatever happens.
        parameters: Parameters of ``net``.
        values: What stands in for them, wherever they occur.

    Yields:
        None.
    """
    memo = {id(old): new for old, new in zip(parameters, values, strict=True)}
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in net.modules():
            saved += [(home, dict(home)) for home in (module._parameters, module._buffers)]
            _substitute(module._parameters, memo, lambda tensor: tensor.detach())
            _substitute(module._buffers, memo, lambda tensor: tensor.detach().clone())
        _renew_lists(net)
        yield
    finally:
        for home, before in reversed(saved):
            home.clear()
            home.update(before)
        _renew_lists(net)


def _substitute(home: dict[str, Any], memo: dict[int, Tensor], otherwise: Callable[[Tensor], Tensor]) -> None:
    known = {id(new) for new in memo.values()}
    for name, tensor in home.items():
        if tensor is not None and id(tensor) not in known:
            if id(tensor) not in memo:
                memo[id(tensor)] = otherwise(tensor)
            home[name] = memo[id(tensor)]


def _renew_lists(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.RNNBase):  # it keeps a list of its own tensors
            module._init_flat_weights()
