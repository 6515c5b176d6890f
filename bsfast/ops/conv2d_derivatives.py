"""Backward and vmap formulas of the convolution triple, in terms of the triple.

Convolution is bilinear: with ``<t, conv2d(x, w)> = <conv2d_input_grad(t, w), x> = <conv2d_weight_grad(x, t), w>`` the
gradients of each of the three are the other two. ``f`` holds the three functions by name: the raw operators or the
differentiable ones. Shapes as in :mod:`bsfast.ops.conv2d`.
"""

from typing import Any

from torch import Tensor

from bsfast.ops.bilinear import Functions

Grads = tuple[Tensor | None, Tensor | None]


def conv2d_backward(f: Functions, needs: Any, t: Tensor, x: Tensor, w: Tensor, *geometry: Any) -> Grads:
    """Gradients of <t, conv2d(x, w)>."""
    return (
        f["conv2d_input_grad"](t, w, tuple(x.shape), *geometry) if needs[0] else None,
        f["conv2d_weight_grad"](x, t, tuple(w.shape[-2:]), *geometry) if needs[1] else None,
    )


def input_grad_backward(f: Functions, needs: Any, t: Tensor, g: Tensor, w: Tensor, _: Any, *geometry: Any) -> Grads:
    """Gradients of <t, conv2d_input_grad(g, w)>."""
    return (
        f["conv2d"](t, w, *geometry) if needs[0] else None,
        f["conv2d_weight_grad"](t, g, tuple(w.shape[-2:]), *geometry) if needs[1] else None,
    )


def weight_grad_backward(f: Functions, needs: Any, t: Tensor, x: Tensor, g: Tensor, _: Any, *geometry: Any) -> Grads:
    """Gradients of <t, conv2d_weight_grad(x, g)>."""
    return (
        f["conv2d_input_grad"](g, t, tuple(x.shape), *geometry) if needs[0] else None,
        f["conv2d"](x, t, *geometry) if needs[1] else None,
    )


def conv2d_vmap(
    f: Functions, size: int, dims: tuple[Any, ...], x: Tensor, w: Tensor, *geometry: Any
) -> tuple[Tensor, int]:
    """Map conv2d: the mapped axis joins the branches, or the samples where one input stays shared."""
    shared, branches = _is_shared(x, dims[0]), _branches(w, dims[1])
    if shared and dims[1] is None:
        samples = x.movedim(dims[0], 0).shape[1]
        return f["conv2d"](fold(x, dims[0], size), w, *geometry).unflatten(1, (size, samples)), 1
    folded = x if shared and dims[0] is None else fold_input(x, dims[0], size, branches)
    return f["conv2d"](folded, fold(w, dims[1], size), *geometry).unflatten(0, (size, branches)), 0


def input_grad_vmap(
    f: Functions, size: int, dims: tuple[Any, ...], g: Tensor, w: Tensor, input_size: tuple[int, ...], *geometry: Any
) -> tuple[Tensor, int]:
    """Map conv2d_input_grad: as conv2d_vmap, and gradients of a shared input are summed over branches afterwards."""
    shared, branches = len(input_size) == 4, _branches(w, dims[1])
    samples, *rest = input_size[-4:]
    if shared and dims[1] is None:
        folded = g.movedim(dims[0], 1).flatten(1, 2)
        x_grad = f["conv2d_input_grad"](folded, w, (size * samples, *rest), *geometry)
        return x_grad.unflatten(0, (size, samples)), 0
    folded_size = (size * branches, samples, *rest)
    x_grad = f["conv2d_input_grad"](fold(g, dims[0], size), fold(w, dims[1], size), folded_size, *geometry)
    x_grad = x_grad.unflatten(0, (size, branches))
    return (x_grad.sum(1) if shared else x_grad), 0


def weight_grad_vmap(
    f: Functions, size: int, dims: tuple[Any, ...], x: Tensor, g: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    """Map conv2d_weight_grad: the mapped axis joins the branches."""
    branches = _branches(g, dims[1])
    folded = x if _is_shared(x, dims[0]) and dims[0] is None else fold_input(x, dims[0], size, branches)
    w_grad = f["conv2d_weight_grad"](folded, fold(g, dims[1], size), *rest)
    return w_grad.unflatten(0, (size, branches)), 0


def _is_shared(x: Tensor, dim: int | None) -> bool:
    return x.dim() - (dim is not None) == 4


def _branches(t: Tensor, dim: int | None) -> int:
    return t.shape[0] if dim is None else t.movedim(dim, 0).shape[1]


def fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Fold the mapped axis, or ``size`` copies, into axis 0."""
    t = t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)
    return t.flatten(0, 1)


def fold_input(x: Tensor, dim: int | None, size: int, branches: int) -> Tensor:
    """Fold the mapped axis into the branch axis, which a shared input is given first."""
    if _is_shared(x, dim):
        x = x.movedim(dim, 0).unsqueeze(1).expand(-1, branches, -1, -1, -1, -1)  # type: ignore[arg-type]
        dim = 0
    return fold(x, dim, size)
