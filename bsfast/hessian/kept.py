"""What products with one batch have in common, kept between products while nothing that it depends on changes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bsfast.hessian.data import Batch, Batches
from bsfast.hessian.losses import Loss


class _Entry(NamedTuple):
    state: list[Tensor]  # copies of what the sweep depends on
    modes: list[bool]
    sweep: Any


class Kept:
    """Sweeps (``Branched.curvature_sweep``) of the batches of a Hessian, by their place in the data.

    Values are compared, not identities or version counters, which writes through ``.data`` do not change: comparing
    takes a thousandth of a product.

    Args:
        net: A net; one without ``curvature_sweep``, as the reference, has none.
        tensors: The parameters in question.
        loss: Loss of the sum.
        most_bytes: Most memory that is kept, bytes; what does not fit is made again for every call.
    """

    def __init__(self, net: nn.Module, tensors: Sequence[Tensor], loss: Loss, most_bytes: int) -> None:
        self._net, self._tensors, self._loss, self._left = net, tensors, loss, most_bytes
        self._make = getattr(net, "curvature_sweep", None)
        self._entries: dict[int, _Entry] = {}

    def batches(self, batches: Batches) -> Iterator[tuple[Batch, Any]]:
        """Iterate over the data, with the sweep of each batch, or None."""
        own = [*self._net.parameters(), *self._net.buffers()]
        modes = [module.training for module in self._net.modules()]
        for i, batch in enumerate(batches):
            yield batch, None if self._make is None else self._sweep(i, batch, own, modes)

    def _sweep(self, i: int, batch: Batch, own: Sequence[Tensor], modes: list[bool]) -> Any:
        # The weight is a part of the gradient that is kept, and depends on the number of all samples.
        weight = torch.tensor(batch.weight, dtype=torch.float64)
        targets = [batch.target] if isinstance(batch.target, Tensor) else []
        state = [*own, *batch.inputs, *targets, weight]
        entry = self._entries.get(i)
        if entry is not None and entry.modes == modes and _equal(entry.state, state):
            return entry.sweep
        if entry is not None:
            self._left += _nbytes(self._entries.pop(i))
        assert self._make is not None  # noqa: S101 (for the type checker)
        sweep = self._make(self._tensors, *batch.inputs)
        if sweep is None:
            return None
        f = sweep.outputs.sum(0)
        g = batch.weight * self._loss.gradient(f, batch.target)
        sweep.set_gradient(g.expand_as(sweep.outputs).contiguous())
        if targets and self._left > 0:
            entry = _Entry([tensor.detach().clone() for tensor in state], modes, sweep)
            if _nbytes(entry) <= self._left:
                self._entries[i] = entry
                self._left -= _nbytes(entry)
        return sweep


def _equal(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    same = len(before) == len(now) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(before, now, strict=True)
    )
    return same and all(a.device == b.device and torch.equal(a, b) for a, b in zip(before, now, strict=True))


def _nbytes(entry: _Entry) -> int:
    size: int = entry.sweep.nbytes
    return size + sum(tensor.nbytes for tensor in entry.state)
