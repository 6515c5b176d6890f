"""Which shortcuts are exact for the chosen parameters, as the net itself proves from its traced graph."""

from typing import NamedTuple

from torch import nn

from bsfast.hessian.data import Batches
from bsfast.hessian.parameters import BranchParameters


class Structure(NamedTuple):
    """What is known of the branches as functions of the chosen parameters.

    Attributes:
        layers: For every name the path of the layer that reads it, where per-sample gradients are valid; else None.
        one_layer_linear: Whether all parameters are of one layer from which on the branches are piecewise linear: a
            branch's own block is then its Gauss-Newton block, almost everywhere.
        each_linear: Whether this holds for each parameter by itself: the diagonal is then the Gauss-Newton diagonal.
        rank_one: Whether the one layer is linear on one vector a sample.
        reason: Why, or why not.
    """

    layers: dict[str, str] | None
    one_layer_linear: bool
    each_linear: bool
    rank_one: bool
    reason: str


def structure_of(net: nn.Module, parameters: BranchParameters, batches: Batches, chunk: int) -> Structure:
    """Ask the net, for every shape of batch that will occur.

    Args:
        net: A net; one without ``piecewise_linear_from``, as the reference, proves nothing.
        parameters: The chosen parameters.
        batches: The data.
        chunk: Most samples at a time.

    Returns:
        What holds for all shapes.
    """
    prove = getattr(net, "piecewise_linear_from", None)
    if prove is None:
        return Structure(None, False, False, False, f"{type(net).__name__} has no traced graph to prove anything from")
    tails = []
    for batch in batches.examples_in_chunks(chunk):
        by_name = prove(parameters.names, *batch.inputs)
        tails += [(name, by_name[name]) for name in parameters.names]
    refused = next((tail.reason for _, tail in tails if not tail.piecewise_linear), "")
    if not all(tail.per_sample for _, tail in tails):
        return Structure(None, False, not refused, False, refused)
    layers = {name: tail.layer for name, tail in tails}
    one_layer = len(set(layers.values())) == 1
    reason = refused or (tails[0][1].reason if one_layer else "the parameters are of several layers")
    rank_one = one_layer and all(tail.rank_one for _, tail in tails)
    return Structure(layers, one_layer and not refused, not refused, rank_one, reason)
