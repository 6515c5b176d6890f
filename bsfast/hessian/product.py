"""One product of a Hessian with a vector: forward over reverse, all branches at once.

With J_k = dv_k / dtheta_k, L'' the Hessian of the loss in f = sum_k v_k, and g = dL/df,

    H_kl = J_k^T L'' J_l + (k == l) sum_i g_i Hess(v_k,i).

A dual forward pass gives every t_k = J_k u_k. The reverse pass of branch k, seeded with the dual number
(g, L'' sum_l t_l), has the product of the whole Hessian as its tangent; seeded with (g, L'' t_k), that of its diagonal
block: all M block products are as cheap as one product. Seeds without g, or without a tangent, give the two terms.
Where an operator has no forward mode, the same two terms are computed by double backward.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsfast.hessian.data import Batch
from bsfast.hessian.losses import Loss
from bsfast.hessian.parameters import substituted

Coupling = Literal["full", "block_diag", "cross"]
Kind = Literal["hessian", "ggn", "residual"]
COUPLINGS: Final = ("full", "block_diag", "cross")
KINDS: Final = ("hessian", "ggn", "residual")


def product(
    net: nn.Module,
    tensors: Sequence[Tensor],
    loss: Loss,
    batch: Batch,
    vectors: Sequence[Tensor],
    *,
    coupling: Coupling,
    kind: Kind,
    sweep: Any = None,
) -> list[Tensor]:
    """Multiply the Hessian of one batch's weighted loss by a vector.

    Args:
        net: Net with ``branch_outputs``.
        tensors: Its parameters in question.
        loss: Loss of the sum.
        batch: Samples and their weight.
        vectors: Shaped as ``tensors``.
        coupling: Which blocks: all, those with k = l, or those with k != l.
        kind: The Hessian, its Gauss-Newton term or the rest.
        sweep: What the net keeps for this batch (:mod:`bsfast.hessian.kept`), or None.

    Returns:
        Shaped as ``tensors``.
    """
    if kind == "residual" and coupling == "cross":
        return [torch.zeros_like(tensor) for tensor in tensors]
    only_gauss_newton = kind == "ggn" or coupling == "cross"  # blocks with k != l have no other term
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        try:
            if sweep is not None:
                return _by_sweep(sweep, loss, batch, vectors, coupling, kind)
            if not only_gauss_newton:
                return _forward_over_reverse(net, tensors, loss, batch, vectors, coupling, kind)
        except RuntimeError as error:
            _raise_unless_forward_mode(error)
        if only_gauss_newton:
            return _gauss_newton(net, tensors, loss, batch, vectors, coupling)
        rest = _reverse_over_reverse(net, tensors, loss, batch, vectors)
        if kind == "residual":
            return rest
        term = _gauss_newton(net, tensors, loss, batch, vectors, coupling)
        return [a + b for a, b in zip(term, rest, strict=True)]


def tangents(net: nn.Module, tensors: Sequence[Tensor], batch: Batch, vectors: Sequence[Tensor]) -> Tensor:
    """J_k u_k of every branch, shape of ``branch_outputs``; arguments as :func:`product`."""
    with sdpa_kernel(SDPBackend.MATH):
        try:
            with torch.no_grad(), forward.dual_level():
                duals = _duals([tensor.detach() for tensor in tensors], vectors)
                with substituted(net, tensors, duals):
                    primal, tangent = forward.unpack_dual(net.branch_outputs(*batch.inputs))  # type: ignore[operator]
                return torch.zeros_like(primal) if tangent is None else tangent.contiguous()
        except RuntimeError as error:
            _raise_unless_forward_mode(error)
        with torch.enable_grad():  # J^T w is linear in w, so J u is the gradient of <J^T w, u>
            leaves, v = _run(net, tensors, batch)
            w = torch.zeros_like(v, requires_grad=True)
            if not v.requires_grad:
                return w.detach()
            pulled = torch.autograd.grad(v, leaves, w, create_graph=True, materialize_grads=True)
            return torch.autograd.grad(pulled, w, vectors, materialize_grads=True)[0].contiguous()


def _by_sweep(
    sweep: Any, loss: Loss, batch: Batch, vectors: Sequence[Tensor], coupling: Coupling, kind: Kind
) -> list[Tensor]:
    f = sweep.outputs.sum(0)

    def seed(t: Tensor) -> Tensor:
        return torch.zeros_like(t) if kind == "residual" else _coupled(loss, f, batch, t, coupling)

    result: list[Tensor] = sweep.product(vectors, seed, curved=kind != "ggn" and coupling != "cross")
    return result


def _forward_over_reverse(
    net: nn.Module,
    tensors: Sequence[Tensor],
    loss: Loss,
    batch: Batch,
    vectors: Sequence[Tensor],
    coupling: Coupling,
    kind: Kind,
) -> list[Tensor]:
    with torch.enable_grad(), forward.dual_level():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with substituted(net, tensors, _duals(leaves, vectors)):
            v = net.branch_outputs(*batch.inputs)  # type: ignore[operator]
        primal, tangent = forward.unpack_dual(v)
        if not v.requires_grad:
            return [torch.zeros_like(tensor) for tensor in tensors]
        f = primal.detach().sum(0)
        g = (batch.weight * loss.gradient(f, batch.target)).expand_as(primal).contiguous()
        if kind == "residual" or tangent is None:
            seed = torch.zeros_like(g)
        else:
            seed = _coupled(loss, f, batch, tangent.detach(), coupling)
        grads = torch.autograd.grad(v, leaves, forward.make_dual(g, seed), allow_unused=True)
        return _or_zeros([None if own is None else forward.unpack_dual(own).tangent for own in grads], tensors)


def _reverse_over_reverse(
    net: nn.Module, tensors: Sequence[Tensor], loss: Loss, batch: Batch, vectors: Sequence[Tensor]
) -> list[Tensor]:
    """The residual term, for nets with operators that have no forward mode: the gradient of <J^T g, u>, g fixed."""
    with torch.enable_grad():
        leaves, v = _run(net, tensors, batch)
        f = v.detach().sum(0)
        g = (batch.weight * loss.gradient(f, batch.target)).expand_as(v)
        grads = torch.autograd.grad(v, leaves, g, create_graph=True, materialize_grads=True)
        pairs = [(own, vector) for own, vector in zip(grads, vectors, strict=True) if own.requires_grad]
        if not pairs:
            return [torch.zeros_like(tensor) for tensor in tensors]
        outputs, seeds = zip(*pairs, strict=True)
        return _or_zeros(torch.autograd.grad(outputs, leaves, seeds, allow_unused=True), tensors)


def _gauss_newton(
    net: nn.Module,
    tensors: Sequence[Tensor],
    loss: Loss,
    batch: Batch,
    vectors: Sequence[Tensor],
    coupling: Coupling,
) -> list[Tensor]:
    t = tangents(net, tensors, batch, vectors)
    with torch.enable_grad():
        leaves, v = _run(net, tensors, batch)
        if not v.requires_grad:
            return [torch.zeros_like(tensor) for tensor in tensors]
        seed = _coupled(loss, v.detach().sum(0), batch, t, coupling)
        return _or_zeros(torch.autograd.grad(v, leaves, seed, allow_unused=True), tensors)


def _run(net: nn.Module, tensors: Sequence[Tensor], batch: Batch) -> tuple[list[Tensor], Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with substituted(net, tensors, leaves):
        return leaves, net.branch_outputs(*batch.inputs)  # type: ignore[operator]


def _duals(leaves: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    return [forward.make_dual(leaf, vector.contiguous()) for leaf, vector in zip(leaves, vectors, strict=True)]


def _raise_unless_forward_mode(error: RuntimeError) -> None:
    """Some operators of torch (silu, group_norm) and custom functions without a jvp have no forward mode."""
    if not any(words in str(error) for words in ("forward AD", "forward mode", "jvp")):
        raise error


def _coupled(loss: Loss, f: Tensor, batch: Batch, t: Tensor, coupling: Coupling) -> Tensor:
    """The seed of every branch's reverse pass, L'' times its own tangent, the sum of all, or that of the others."""
    if coupling == "full":
        return (batch.weight * loss.hvp(f, batch.target, t.sum(0))).expand_as(t).contiguous()
    return batch.weight * loss.hvp(f, batch.target, t if coupling == "block_diag" else t.sum(0) - t)


def _or_zeros(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(own) if grad is None else grad.detach() for grad, own in zip(grads, tensors, strict=True)]
