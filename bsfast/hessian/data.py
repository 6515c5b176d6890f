"""Batches of data: their weights in the average over all samples, chunks of them, and checks that they repeat.

The loss of all data is the mean (or sum) over samples: a batch of |B| of N samples has weight |B| / N (or 1).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bsfast.hessian.losses import Loss
from bsfast.hessian.parameters import substituted

ChunkSize = int | Literal["auto"] | None
FEW = 8  # samples that show whether a batch may be cut apart
LARGEST_CHUNK = 64  # samples; more are not faster: products with 16 ResNets of 8 to 32 channels take 2.1 GiB


class Batch(NamedTuple):
    """Some samples.

    Attributes:
        inputs: What one branch takes.
        target: Targets.
        weight: Factor of their loss in the loss of all data.
    """

    inputs: tuple[Tensor, ...]
    target: Any
    weight: float


class Batches:
    """The data of a Hessian; iterate over it as often as needed.

    Args:
        net: Net with ``branch_outputs``.
        loss: Loss of the sum.
        data: One batch ``(x, y)`` with a tensor y, where x is a tensor or a tuple of inputs; or something to iterate
            over again and again, such as a DataLoader, that gives batches.
        num_data: N, if not the number of samples that ``data`` gives.
        chunk_size: Most samples at a time; ``"auto"`` for at most 64 where samples are independent; None for whole
            batches.
        check_deterministic: Whether to compare loss and gradient of two passes over the data.

    Attributes:
        num_data: N.
        examples: One batch of every combination of shapes.

    Raises:
        ValueError: If there is no data, or chunks are asked for where samples are not independent.
        RuntimeError: If two passes differ.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        data: Any,
        *,
        num_data: int | None = None,
        chunk_size: ChunkSize = "auto",
        check_deterministic: bool = True,
    ) -> None:
        self._data = data
        self._net, self._loss = net, loss
        self._chunk: int | None = None
        if not (chunk_size in {"auto", None} or (isinstance(chunk_size, int) and chunk_size > 0)):
            raise ValueError(f"hessian: chunk_size must be a positive int, 'auto' or None, got {chunk_size!r}")
        with isolated_random():
            counts = [len(inputs[0]) for inputs, _ in _batches_of(data)]
            if not counts:
                raise ValueError("hessian: data must give at least one batch, got none")
            if num_data is not None and not (isinstance(num_data, int) and num_data > 0):
                raise ValueError(f"hessian: num_data must be a positive int or None, got {num_data!r}")
            self.num_data = num_data if num_data is not None else sum(counts)
            self._chunk = self._choose_chunk(chunk_size, max(counts))
            if check_deterministic:
                self._check_two_passes()
        self.examples = self._one_of_each_shape()

    def __iter__(self) -> Iterator[Batch]:
        with isolated_random():
            for inputs, target in _batches_of(self._data):
                yield from self._chunks(inputs, target, self._chunk)

    def in_chunks(self, size: int) -> Iterator[Batch]:
        """Iterate with at most ``size`` samples at a time, where samples may be cut apart at all."""
        with isolated_random():
            for inputs, target in _batches_of(self._data):
                yield from self._chunks(inputs, target, self._at_most(size))

    def _chunks(self, inputs: tuple[Tensor, ...], target: Any, size: int | None) -> Iterator[Batch]:
        count = len(inputs[0])
        for start in range(0, count, size or count):
            part = slice(start, min(start + (size or count), count))
            weight = (part.stop - part.start) / self.num_data if self._loss.reduction == "mean" else 1.0
            whole = part.stop - part.start == count
            yield Batch(inputs if whole else tuple(x[part] for x in inputs), target if whole else target[part], weight)

    def _choose_chunk(self, wanted: ChunkSize, largest: int) -> int | None:
        if wanted is None:
            return None
        if wanted != "auto" and wanted >= largest:
            return wanted
        why_not = self._why_samples_depend()
        if why_not and wanted != "auto":
            raise ValueError(f"hessian: chunk_size must be None where {why_not}, got {wanted}")
        return None if why_not else LARGEST_CHUNK if wanted == "auto" else wanted

    def _why_samples_depend(self) -> str:
        """Compare a batch with its halves; ``""`` if samples are independent."""
        for module in self._net.modules():
            if "BatchNorm" in type(module).__name__ and (
                module.training or getattr(module, "running_mean", None) is None
            ):
                return "batch normalisation uses the statistics of the batch"
        inputs, target = next(iter(_batches_of(self._data)))
        if not isinstance(target, Tensor) or len(target) != len(inputs[0]):
            return "a batch cannot be cut"
        inputs, target = tuple(x[:FEW] for x in inputs), target[:FEW]
        count = len(inputs[0])
        if count < 2:
            return "a batch has one sample"
        parts = [slice(0, count // 2), slice(count // 2, count)]
        with isolated_random(), torch.no_grad(), substituted(self._net, [], []):
            try:
                whole = self._net.branch_outputs(*inputs)  # type: ignore[operator]
                halves = [self._net.branch_outputs(*(x[part] for x in inputs)) for part in parts]  # type: ignore[operator]
            except (
                RuntimeError,
                ValueError,
                IndexError,
            ):  # one that is not about the cut comes again with whole batches
                return "the net does not take a part of a batch"
            if whole.shape[1] != count or not _close(torch.cat(halves, 1), whole):
                return "the net mixes the samples of a batch"
            values = [self._loss.value(v.sum(0), target[part]) for v, part in zip(halves, parts, strict=True)]
            if self._loss.reduction == "mean":
                values = [value * len(v[0]) / count for value, v in zip(values, halves, strict=True)]
            same = _close(values[0] + values[1], self._loss.value(whole.sum(0), target))
        return "" if same else "the loss is not a mean or sum over samples"

    def few(self) -> Batch:
        """A few samples where a batch may be cut, else one batch."""
        first = self.examples[0]
        return next(self._chunks(first.inputs, first.target, FEW if self._chunk else None))

    def examples_in_chunks(self, size: int) -> list[Batch]:
        """One batch of every combination of shapes that :meth:`in_chunks` gives."""
        seen: dict[tuple[Any, ...], Batch] = {}
        for example in self.examples:
            for batch in self._chunks(example.inputs, example.target, self._at_most(size)):
                seen.setdefault(_shapes_of(batch), batch)
        return list(seen.values())

    def _at_most(self, size: int | None) -> int | None:
        return min(size, self._chunk) if size and self._chunk else self._chunk

    def _one_of_each_shape(self) -> list[Batch]:
        seen: dict[tuple[Any, ...], Batch] = {}
        for batch in self:
            seen.setdefault(_shapes_of(batch), batch)
        return list(seen.values())

    def _check_two_passes(self) -> None:
        first, second = self._loss_and_gradient(), self._loss_and_gradient()
        for name, a, b in zip(("the number of samples", "the loss", "the gradient in f"), first, second, strict=True):
            if not bool(a.isfinite().all()):
                raise ValueError(f"hessian: net and data must give a finite loss, got {name} of {a.tolist()}")
            if not _close(a, b):
                raise RuntimeError(
                    f"hessian: two passes over the data must agree, got another value of {name} the second time; "
                    "switch off dropout, and shuffling where batches matter (batch normalisation in training, "
                    "drop_last), or pass check_deterministic=False"
                )

    def _for_check(self) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        """All data, whose order and grouping may be random; of one batch in memory a few samples are enough."""
        for inputs, target in _batches_of(self._data):
            if _is_batch(self._data) and self._chunk:
                yield tuple(x[:FEW] for x in inputs), target[:FEW]
                return
            for batch in self._chunks(inputs, target, self._chunk):
                yield batch.inputs, batch.target

    def _loss_and_gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        """Number of samples, loss, and sums of dL/df and v that do not depend on how samples are batched."""
        total, value, sums = torch.zeros(()), torch.zeros((), dtype=torch.float64), torch.zeros(3).double()
        for inputs, target in self._for_check():
            count = len(inputs[0])
            weight = count / self.num_data if self._loss.reduction == "mean" else 1.0
            with torch.no_grad(), substituted(self._net, [], []):
                v = self._net.branch_outputs(*inputs)  # type: ignore[operator]
            f = v.sum(0)
            g = self._loss.gradient(f, target).double() * (count if self._loss.reduction == "mean" else 1)
            total += count
            value += weight * self._loss.value(f, target).double().cpu()
            sums += torch.stack([g.square().sum(), (g * f).sum(), v.double().square().sum()]).cpu()
        return total, value, sums


def _is_batch(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor)


def _batches_of(data: Any) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    if _is_batch(data):
        yield _inputs(data[0]), data[1]
        return
    if not isinstance(data, Iterable) or isinstance(data, (Iterator, Tensor)):
        raise TypeError(
            f"hessian: data must be a batch (x, y) or batches that can be iterated over again, got "
            f"{type(data).__name__}"
        )
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"hessian: data must give batches (x, y), got {type(batch).__name__}")
        yield _inputs(batch[0]), batch[1]


def _shapes_of(batch: Batch) -> tuple[Any, ...]:
    return tuple((tuple(x.shape), x.dtype) for x in batch.inputs)


def _inputs(x: Any) -> tuple[Tensor, ...]:
    inputs: Sequence[Any] = x if isinstance(x, (tuple, list)) else [x]
    if not inputs or not all(isinstance(own, Tensor) and own.dim() > 0 for own in inputs):
        raise TypeError(f"hessian: data must give tensors as inputs, got {type(x).__name__}")
    if len({len(own) for own in inputs}) > 1 or len(inputs[0]) == 0:
        raise ValueError(f"hessian: inputs must have one N of at least 1, got {[tuple(own.shape) for own in inputs]}")
    return tuple(inputs)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what another order of summation may change."""
    if a.shape != b.shape:
        return False
    bound = max(1e-9, 1e4 * torch.finfo(a.dtype).eps) * max(a.abs().max().item(), b.abs().max().item())
    return bool((a - b).abs().max().item() <= bound)


@contextmanager
def isolated_random() -> Iterator[None]:
    """Keep what runs inside from moving the global random generators of torch, those of all devices included."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
