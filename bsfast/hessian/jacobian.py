"""Columns of the Gauss-Newton root: with L'' = R R^T, V_k = J_k^T R gives the blocks V_k V_l^T.

R has K <= C columns a sample, so one pass of the net's tail for each of the K gives the columns of all samples and
branches. Samples come in chunks so that activations stay in cache.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from bsfast.hessian.data import Batches
from bsfast.hessian.losses import Loss, Root

CHUNK: Final = 32  # samples; measured on 2 cores of an EPYC with 32 MiB of L3 cache a socket


class NoRootError(Exception):
    """The loss has no Hessian of every sample by itself, or one too large."""

    reason = "the loss mixes samples, or has too many outputs a sample"


class Column(NamedTuple):
    """One column of the root for every sample of a chunk.

    Attributes:
        number: Its number, below ``of``.
        of: K.
        gradients: By name, J_k^T times the column, ``(M, *shape, N)``.
        signs: Signs ``(N,)`` of the column in L'', or None if positive.
    """

    number: int
    of: int
    gradients: dict[str, Tensor]
    signs: Tensor | None


class Chunk(NamedTuple):
    """A chunk of samples: the tail of the net, and the root of the weighted loss.

    Attributes:
        jacobian: As ``Branched.weight_jacobian`` gives it.
        seeds: Columns of the root, shape ``(K, N, ...)``.
        signs: ``(K, N)`` or None.
    """

    jacobian: Any
    seeds: Tensor
    signs: Tensor | None

    def columns(self) -> Iterator[Column]:
        """Run the tail backward, column by column."""
        for j, seed in enumerate(self.seeds):
            yield Column(j, len(self.seeds), self.jacobian(seed), None if self.signs is None else self.signs[j])


def chunks(net: nn.Module, layers: dict[str, str], loss: Loss, batches: Batches, chunk: int) -> Iterator[Chunk]:
    """Run the net forward on every chunk.

    Args:
        net: A net with ``weight_jacobian``.
        layers: Paths of the layers, by parameter.
        loss: Loss of the sum.
        batches: The data.
        chunk: Most samples at a time.

    Yields:
        One a chunk.

    Raises:
        NoRootError: If the loss has no root.
    """
    for batch in batches.in_chunks(chunk):
        jacobian = net.weight_jacobian(layers, *batch.inputs)  # type: ignore[operator]
        f = jacobian.outputs.sum(0)
        root = loss.root(f, batch.target)
        if root is None:
            raise NoRootError
        if root.columns.shape[2] == 0:  # one class: the Hessian is zero
            root = Root(torch.zeros_like(f).flatten(1).unsqueeze(2))
        seeds = (root.columns * batch.weight**0.5).movedim(-1, 0).reshape(-1, *f.shape)
        yield Chunk(jacobian, seeds, None if root.signs is None else root.signs.mT)


def packed(chunk: Chunk, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """V of all branches for one chunk.

    Args:
        chunk: The chunk.
        names: The parameters, in the order of rows.

    Returns:
        Shape ``(M, P, K N)``, and signs ``(K N,)`` or None.
    """
    count, samples = chunk.seeds.shape[:2]
    V: Tensor | None = None
    for column in chunk.columns():
        rows = torch.cat([column.gradients[name].flatten(1, -2) for name in names], 1)
        if V is None:
            V = rows.new_empty(*rows.shape[:2], count, samples)
        V[:, :, column.number] = rows
    assert V is not None  # noqa: S101 (K is at least 1)
    return V.flatten(2), None if chunk.signs is None else chunk.signs.flatten()
