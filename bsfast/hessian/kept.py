"""What products with one batch have in common, kept between products while nothing that it depends on changes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bsfast.hessian.data import Batch, Batches
from bsfast.hessian.losses import Loss


class _Net(NamedTuple):
    """A net's state: copies of parameters and buffers; of each module its mode, its hooks and its settings."""

    tensors: list[Tensor]
    modules: list[tuple[Any, ...]]


class _Entry(NamedTuple):
    inputs: list[Tensor]  # copies, which the sweep reads
    sweep: Any
    grad: Tensor  # of the loss in the sum of branches


class Kept:
    """Sweeps (``Branched.curvature_sweep``) of the batches of a Hessian, by their place in the data.

    The values of parameters, buffers and inputs are compared, not identities or version counters, which writes through
    ``.data`` do not change; the loss is evaluated anew for every product.

    Args:
        net: A net; one without ``curvature_sweep``, as the reference, has none.
        tensors: The parameters in question.
        loss: Loss of the sum.
        most_bytes: Most memory that is kept, bytes; what does not fit is made again for every call.
    """

    def __init__(self, net: nn.Module, tensors: Sequence[Tensor], loss: Loss, most_bytes: int) -> None:
        self._net, self._tensors, self._loss, self._most = net, tensors, loss, most_bytes
        self._make = getattr(net, "curvature_sweep", None)
        self._known: _Net | None = None
        self._entries: dict[int, _Entry] = {}

    def batches(self, batches: Batches) -> Iterator[tuple[Batch, Any]]:
        """Iterate over the data, with the sweep of each batch, or None."""
        if self._make is not None:
            self._compare()
        for i, batch in enumerate(batches):
            yield batch, None if self._make is None else self._sweep(i, batch)

    def _compare(self) -> None:
        """Forget everything if the net has changed."""
        tensors = [own.detach() for own in (*self._net.parameters(), *self._net.buffers())]
        modules = [
            (
                module.training,
                *module._forward_hooks,
                *module._forward_pre_hooks,
                repr(getattr(module, "settings", None)),
            )
            for module in self._net.modules()
        ]
        known = self._known
        if known is None or known.modules != modules or not _equal(known.tensors, tensors):
            self._entries.clear()
            self._known = _Net([own.clone() for own in tensors], modules)

    def _sweep(self, i: int, batch: Batch) -> Any:
        entry = self._entries.pop(i, None)
        if entry is None or not _equal(entry.inputs, batch.inputs):
            assert self._make is not None  # noqa: S101 (for the type checker)
            inputs = [own.detach().clone() for own in batch.inputs]
            sweep = self._make(self._tensors, *inputs)
            if sweep is None:
                return None
            entry = _Entry(inputs, sweep, torch.empty(0))
        outputs = entry.sweep.outputs
        grad = batch.weight * self._loss.gradient(outputs.sum(0), batch.target)
        if not _equal([entry.grad], [grad]):
            entry.sweep.set_gradient(grad.expand_as(outputs).contiguous())
            entry = entry._replace(grad=grad)
        if self._nbytes() + _nbytes(entry) <= self._most:
            self._entries[i] = entry
        return entry.sweep

    def _nbytes(self) -> int:
        own = [] if self._known is None else self._known.tensors
        return sum(tensor.nbytes for tensor in own) + sum(map(_nbytes, self._entries.values()))


def _equal(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    same = len(before) == len(now) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(before, now, strict=True)
    )
    return same and all(a.device == b.device and torch.equal(a, b) for a, b in zip(before, now, strict=True))


def _nbytes(entry: _Entry) -> int:
    size: int = entry.sweep.nbytes
    return size + sum(tensor.nbytes for tensor in (*entry.inputs, entry.grad))
