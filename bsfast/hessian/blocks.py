"""Exact dense blocks of the Hessian: of every branch, of every pair of branches, or of one pair."""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsfast.hessian import gauss_newton
from bsfast.hessian.data import ChunkSize
from bsfast.hessian.jacobian import CHUNK, NoRootError
from bsfast.hessian.linear_operator import CHEAPER
from bsfast.hessian.operator import HessianOperator
from bsfast.hessian.parameters import Spec, substituted
from bsfast.hessian.structure import Structure, structure_of

PASSES_A_PRODUCT: Final = 4  # work of a product with the Hessian in passes of one column
MOST_BYTES: Final = 2**32
METHODS: Final = ("auto", "ggn", "khatri_rao", "hvp", "autograd")
Which = str | tuple[int, int]


class Blocks(NamedTuple):
    """Dense blocks.

    Attributes:
        tensor: ``(M, P, P)`` for ``which="diag"``, ``(M, M, P, P)`` for ``"all"``, ``(P_k, P_l)`` for a pair.
        method: How they were computed; ``"ggn+hvp"`` where the blocks of two branches came from per-sample Jacobians
            and those of one from products.
        exact: Whether they are blocks of the Hessian, up to rounding; for piecewise linear nets almost everywhere.
        why: The reason for the method.
        asymmetry: Largest relative difference from the transpose before the mean of both was taken.
    """

    tensor: Tensor
    method: str
    exact: bool
    why: str
    asymmetry: float = 0.0

    def dense(self) -> Tensor:
        """One matrix, branch-major: ``(M P, M P)``, with zeros where blocks were not asked for; or the pair's block."""
        if self.tensor.dim() == 2:
            return self.tensor
        if self.tensor.dim() == 3:
            return torch.block_diag(*self.tensor)
        return self.tensor.transpose(1, 2).flatten(2).flatten(0, 1)


def blocks(
    net: nn.Module,
    loss: Any,
    data: Any,
    *,
    params: Spec = None,
    which: Which = "diag",
    method: str = "auto",
    num_data: int | None = None,
    chunk_size: ChunkSize = "auto",
    check_deterministic: bool = True,
    max_bytes: int = MOST_BYTES,
) -> Blocks:
    """Compute dense blocks of the Hessian of L(sum_k v_k(theta_k, x), y), averaged over data.

    Args:
        net: As for :class:`HessianOperator`.
        loss: As for :class:`HessianOperator`.
        data: As for :class:`HessianOperator`.
        params: As for :class:`HessianOperator`; typically one layer.
        which: ``"diag"``, ``"all"``, or a pair of branches.
        method: ``"ggn"``, per-sample Jacobians and one matrix product; ``"khatri_rao"``, the same for a linear layer
            without forming them; ``"hvp"``, products with unit vectors of all branches at once; ``"autograd"``, a row
            at a time, slow, for checking; ``"auto"``, the fastest that is proven exact for this net.
        num_data: As for :class:`HessianOperator`.
        chunk_size: As for :class:`HessianOperator`.
        check_deterministic: As for :class:`HessianOperator`.
        max_bytes: Most memory that the blocks may take, bytes.

    Returns:
        The blocks, and how they came about. A method that was asked for by name and is not exact says so.

    Raises:
        ValueError: If an argument does not fit, or the method cannot be used; the message says why.

    Example:
        >>> import bsfast
        >>> net = bsfast.fuse(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), num_branches=5)
        >>> data = torch.randn(7, 3), torch.randint(2, (7,))
        >>> result = blocks(net, nn.CrossEntropyLoss(), data, params="0.weight", which="all")
        >>> result.tensor.shape, result.method, result.exact
        (torch.Size([5, 5, 12, 12]), 'khatri_rao', True)
    """  # noqa: DOC502
    whole = HessianOperator(
        net,
        loss,
        data,
        params=params,
        num_data=num_data,
        chunk_size=chunk_size,
        check_deterministic=check_deterministic,
    )
    return blocks_of(whole, which, method, max_bytes=max_bytes)


def blocks_of(
    whole: HessianOperator,
    which: Which,
    method: str,
    structure: Structure | None = None,
    *,
    max_bytes: int = MOST_BYTES,
) -> Blocks:
    """Compute dense blocks of a Hessian that is there already.

    Args:
        whole: The Hessian, ``kind="hessian"``; its coupling does not matter.
        which: As for :func:`blocks`.
        method: As for :func:`blocks`.
        structure: What is known of it, if that is known.
        max_bytes: As for :func:`blocks`.

    Returns:
        As :func:`blocks`.

    Raises:
        ValueError: As :func:`blocks`.
    """
    if method not in METHODS:
        raise ValueError(f"blocks: method must be one of {METHODS}, got {method!r}")
    pair = _checked_pair(which, whole.parameters.num_branches)
    if pair is None:
        whole.parameters.size(f"which={which!r}")
    _check_size(whole, which, method, max_bytes)
    if method == "hvp":
        return _by_products(whole, which, "asked for")
    if method == "autograd":
        return _by_autograd(whole, which)
    structure = structure or structure_of(whole.net, whole.parameters, whole.batches, CHUNK)
    if method == "auto":
        return _automatic(whole, which, structure)
    if structure.layers is None or (method == "khatri_rao" and not structure.rank_one):
        why = structure.reason if structure.layers is None else "the layer is not linear on one vector a sample"
        raise ValueError(f"blocks: method must be 'auto', 'hvp' or 'autograd' here, got {method!r}: {why}")
    exact = structure.one_layer_linear or (pair is not None and pair[0] != pair[1])
    try:
        return Blocks(_gauss_newton(whole, which, structure, method), method, exact, structure.reason)
    except NoRootError as error:
        raise ValueError(
            f"blocks: method must be 'auto', 'hvp' or 'autograd' here, got {method!r}: {error.reason}"
        ) from None


def _check_size(whole: HessianOperator, which: Which, method: str, max_bytes: int) -> None:
    sizes = whole.parameters.sizes
    count = {"diag": sum(size**2 for size in sizes), "all": sum(sizes) ** 2}.get(str(which))
    if count is None:
        row, column = _as_pair(which)
        count = sizes[row] * sizes[column]
    size = count * whole.dtype.itemsize
    if method == "autograd":
        size += 8 * sum(sizes) ** 2
    if size > max_bytes:
        raise ValueError(
            f"blocks: which={which!r} must take at most max_bytes={max_bytes / 2**30:.3g} GiB, got "
            f"{size / 2**30:.3g} GiB for branches of {max(sizes)} parameters; {CHEAPER}"
        )


def _checked_pair(which: Which, M: int) -> tuple[int, int] | None:
    if isinstance(which, str) and which in {"diag", "all"}:
        return None
    if isinstance(which, tuple) and len(which) == 2 and all(isinstance(k, int) and 0 <= k < M for k in which):
        return which
    raise ValueError(f"blocks: which must be 'diag', 'all' or a pair of branches below M={M}, got {which!r}")


def _as_pair(which: Which) -> tuple[int, int]:
    assert not isinstance(which, str)  # noqa: S101 (for the type checker: it was checked)
    return which


def _automatic(whole: HessianOperator, which: Which, structure: Structure) -> Blocks:
    name = "khatri_rao" if structure.rank_one else "ggn"
    two_branches = not isinstance(which, str) and which[0] != which[1]
    columns, products = _outputs_per_sample(whole), max(whole.parameters.sizes)
    if columns > PASSES_A_PRODUCT * products:
        return _by_products(whole, which, f"C={columns} columns are more work than P={products} products")
    try:
        if structure.layers is not None and (structure.one_layer_linear or two_branches):
            why = structure.reason if structure.one_layer_linear else "blocks of two branches are Gauss-Newton blocks"
            return Blocks(_gauss_newton(whole, which, structure, name), name, True, why)
        if structure.layers is not None and which == "all":
            tensor = _gauss_newton(whole, which, structure, name)
            own = _by_products(whole, "diag", structure.reason)
            diagonal = range(whole.parameters.num_branches)
            tensor[diagonal, diagonal] = own.tensor
            return own._replace(tensor=tensor, method=f"{name}+hvp")
    except NoRootError as error:
        return _by_products(whole, which, error.reason)
    return _by_products(whole, which, structure.reason)


def _outputs_per_sample(whole: HessianOperator) -> int:
    example = whole.batches.few()
    with torch.no_grad(), substituted(whole.net, [], []):
        v = whole.net.branch_outputs(*example.inputs)  # type: ignore[operator]
    return v[0].numel() // len(example.inputs[0])


def _gauss_newton(whole: HessianOperator, which: Which, structure: Structure, method: str) -> Tensor:
    compute = gauss_newton.khatri_rao if method == "khatri_rao" else gauss_newton.by_columns
    return compute(whole, which, structure, CHUNK)


def _by_products(whole: HessianOperator, which: Which, why: str) -> Blocks:
    """Unit vectors: in all branches at once for their own blocks, else in one branch after the other."""
    if which == "diag":
        M, P = whole.parameters.num_branches, whole.parameters.sizes[0]
        own = whole.variant(coupling="block_diag")
        tensor = torch.empty(M, P, P, dtype=whole.dtype, device=whole.device)
        eye = torch.eye(P, dtype=whole.dtype, device=whole.device)
        for start in range(0, P, 64):
            tensor[:, :, start : start + 64] = own.per_branch(eye[:, start : start + 64].expand(M, -1, -1))
    elif which == "all":
        M, P = whole.parameters.num_branches, whole.parameters.sizes[0]
        matrix = whole.variant(coupling="full").to_dense(max_bytes=2**62)
        tensor = matrix.view(M, P, M, P).transpose(1, 2).contiguous()
    else:
        row, column = _as_pair(which)
        operator = whole.variant(coupling="block_diag" if row == column else "cross")[row, column]
        tensor = operator.to_dense(max_bytes=2**62)
    return _symmetrised(Blocks(tensor, "hvp", True, why), which)


def _by_autograd(whole: HessianOperator, which: Which) -> Blocks:
    """Rows of the whole matrix by double backward of the loss itself; nothing here is shared with other methods."""
    parameters = whole.parameters
    D = parameters.total
    matrix = torch.zeros(D, D, dtype=torch.float64, device=whole.device)
    for batch in whole.batches:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            leaves = [tensor.detach().requires_grad_() for tensor in parameters.tensors]
            with substituted(whole.net, parameters.tensors, leaves):
                v = whole.net.branch_outputs(*batch.inputs)  # type: ignore[operator]
            value = batch.weight * whole.loss.value(v.sum(0), batch.target)
            grads = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
            gradient = parameters.join(grads)
            for i in range(D) if gradient.requires_grad else ():
                parts = torch.autograd.grad(gradient[i], leaves, retain_graph=True, materialize_grads=True)
                matrix[i] += parameters.join(parts).double()
    matrix = matrix.to(whole.dtype)
    slices = parameters.slices()
    if which == "diag":
        tensor = torch.stack([matrix[own, own] for own in slices])
    elif which == "all":
        tensor = torch.stack([torch.stack([matrix[a, b] for b in slices]) for a in slices])
    else:
        row, column = _as_pair(which)
        tensor = matrix[slices[row], slices[column]]
    return _symmetrised(Blocks(tensor, "autograd", True, "asked for"), which)


def _symmetrised(result: Blocks, which: Which) -> Blocks:
    if not isinstance(which, str) and which[0] != which[1]:
        return result
    other = result.tensor.transpose(0, 1).mT if which == "all" else result.tensor.mT
    size = result.tensor.abs().max().item() if result.tensor.numel() else 0.0
    asymmetry = (result.tensor - other).abs().max().item() / size if size else 0.0
    return result._replace(tensor=(result.tensor + other) / 2, asymmetry=asymmetry)
