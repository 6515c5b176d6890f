"""Ways to the Hessian of M branches in stock PyTorch, by hand and by other libraries, next to bsfast's.

Two matrices: the whole Hessian in the weights of the first layers of all branches, and the block-diagonal one in all
parameters. Batch normalisation is in evaluation mode and the loss is cross-entropy, so that all agree.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bsfast
from bsfast.hessian import CrossEntropy, HessianOperator, blocks, eigsh
from bsfast.reference import ReferenceBranched
from tests.benchmarks.contestants import LAST, OWN
from tests.benchmarks.grouped import Grouped
from tests.benchmarks.network_case import NetworkCase

FIRST = "conv1.weight"
HAND = "9 passes, unfold and GEMM"
CURVLINOPS = importlib.util.find_spec("curvlinops") is not None
BACKPACK = importlib.util.find_spec("backpack") is not None
Columns = Callable[[Tensor], Tensor]


class Problem:
    """The branches of a case in evaluation mode, with its inputs; the same at every call.

    Args:
        case: A case of the classifier.
        dtype: Of everything.
    """

    def __init__(self, case: NetworkCase, dtype: torch.dtype = torch.float32) -> None:
        self.case = case
        self.branches = [branch.to(dtype).eval() for branch in case.make_branches()]
        (x,), self.y = case.make_inputs()
        self.x = x.to(dtype)
        self.first = [branch.conv1.weight for branch in self.branches]

    @property
    def size(self) -> int:
        """D of the first layers."""
        return sum(weight.numel() for weight in self.first)

    def root(self, f: Tensor) -> Tensor:
        """Columns of the root of the loss's Hessian, ``(K, N, C)``."""
        return CrossEntropy().root(f.detach(), self.y).columns.movedim(2, 0)


def own_matrix(problem: Problem) -> Callable[[], Tensor]:
    net = bsfast.fuse(problem.branches).eval()
    data = problem.x, problem.y
    return lambda: blocks(net, F.cross_entropy, data, params=FIRST, which="all", check_deterministic=False).dense()


def loop_by_hand(
    problem: Problem, memory_format: torch.memory_format = torch.contiguous_format
) -> Callable[[], Tensor]:
    """Per branch one pass from the loss to the stem's output for each column of the root, then patches of the input."""
    x = problem.x.contiguous(memory_format=memory_format)
    branches = [branch.to(memory_format=memory_format) for branch in problem.branches]

    def compute() -> Tensor:
        patches = F.unfold(problem.x, 3, padding=1).mT  # (N, L, 27)
        stems = [branch.conv1(x).detach().requires_grad_() for branch in branches]
        outputs = [branch.from_stem(stem) for branch, stem in zip(branches, stems, strict=True)]
        seeds = problem.root(sum(outputs))
        rows = []
        for stem, v in zip(stems, outputs, strict=True):
            grads = [torch.autograd.grad(v, stem, seed, retain_graph=True)[0] for seed in seeds]
            rows.append(torch.stack([grad.flatten(2) @ patches for grad in grads]).flatten(2))  # (K, N, P)
        V = torch.cat(rows, 2).flatten(0, 1)
        return V.mT @ V

    return compute


def grouped_by_hand(problem: Problem, memory_format: torch.memory_format) -> Callable[[], Tensor]:
    """The same on grouped convolutions, all branches in one pass."""
    net = Grouped(problem.branches, problem.case.shared).eval().to(problem.x.dtype, memory_format=memory_format).net
    x, M = problem.x.contiguous(memory_format=memory_format), len(problem.branches)

    def compute() -> Tensor:
        patches = F.unfold(problem.x, 3, padding=1).mT
        stem = net.conv1(x).detach().requires_grad_()
        v = net.from_stem(stem).unflatten(1, (M, -1))
        seeds = problem.root(v.sum(1))
        rows = []
        for seed in seeds:
            (grad,) = torch.autograd.grad(v, stem, seed.unsqueeze(1).expand_as(v), retain_graph=True)
            rows.append((grad.flatten(2) @ patches).flatten(1))  # (N, M P)
        V = torch.cat(rows)
        return V.mT @ V

    return compute


def backpack_matrix(problem: Problem) -> Callable[[], Tensor]:
    """BackPACK's per-sample root of the Gauss-Newton matrix, on the branches rewritten with its modules; then GEMM."""
    from backpack import backpack, extend
    from backpack.custom_module.branching import Parallel, SumModule
    from backpack.extensions import SqrtGGNExact

    def block(own: nn.Module) -> list[nn.Module]:
        main = nn.Sequential(own.conv1, own.bn1, nn.ReLU(), own.conv2, own.bn2)
        shortcut = nn.Sequential(*own.shortcut) if len(own.shortcut) else nn.Identity()
        return [Parallel(main, shortcut, merge_module=SumModule()), nn.ReLU()]

    def rewritten(branch: nn.Module) -> nn.Module:
        stages = (branch.layer1, branch.layer2, branch.layer3, branch.layer4)
        blocks = [module for stage in stages for own in stage for module in block(own)]
        return nn.Sequential(branch.conv1, branch.bn1, nn.ReLU(), *blocks, nn.AvgPool2d(4), nn.Flatten(), branch.linear)

    for branch in problem.branches:
        branch.requires_grad_(False)
        branch.conv1.requires_grad_()
    branches = [rewritten(branch) for branch in problem.branches]
    whole = Parallel(*branches, merge_module=SumModule()) if len(branches) > 1 else branches[0]
    net, loss = extend(whole.eval()), extend(nn.CrossEntropyLoss())

    def compute() -> Tensor:
        for weight in problem.first:
            weight.grad = None
        before = torch.get_default_dtype()
        torch.set_default_dtype(problem.x.dtype)  # which BackPACK makes its own modules with
        with backpack(SqrtGGNExact()):
            loss(net(problem.x), problem.y).backward()
        torch.set_default_dtype(before)
        V = torch.cat([weight.sqrt_ggn_exact.flatten(2) for weight in problem.first], 2).flatten(0, 1)
        for weight in problem.first:
            del weight.sqrt_ggn_exact
        return V.mT @ V

    return compute


def autograd_columns(problem: Problem) -> Columns:
    """One column of double backward at a time."""
    net = ReferenceBranched(problem.branches)

    def multiply(U: Tensor) -> Tensor:
        grads = torch.autograd.grad(F.cross_entropy(net(problem.x), problem.y), problem.first, create_graph=True)
        gradient = torch.cat([grad.flatten() for grad in grads])
        products = [torch.autograd.grad(gradient, problem.first, u, retain_graph=True) for u in U.mT]
        return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in products], 1)

    return multiply


def functional_columns(problem: Problem) -> Columns:
    """``torch.func.hessian``, forward over reverse, one column at a time so that it fits into memory."""
    net = ReferenceBranched(problem.branches)
    names = [f"branches.{k}.{FIRST}" for k in range(len(problem.branches))]
    weights = {name: weight.detach() for name, weight in zip(names, problem.first, strict=True)}

    def loss(own: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, own, (problem.x,)), problem.y)

    def multiply(U: Tensor) -> Tensor:
        def product(u: Tensor) -> Tensor:
            parts = u.split([weight.numel() for weight in weights.values()])
            shaped = zip(weights.items(), parts, strict=True)
            tangents = {name: part.view_as(weight) for (name, weight), part in shaped}
            _, result = torch.func.jvp(torch.func.grad(loss), (weights,), (tangents,))
            return torch.cat([part.flatten() for part in result.values()])

        return torch.func.vmap(product, in_dims=1, out_dims=1, chunk_size=1)(U)

    return multiply


def curvlinops_columns(problem: Problem) -> Columns:
    from curvlinops import HessianLinearOperator

    net = ReferenceBranched(problem.branches)
    loss, data = nn.CrossEntropyLoss(), [(problem.x, problem.y)]
    H = HessianLinearOperator(net, loss, problem.first, data, check_deterministic=False)
    return lambda U: H @ U


class WithOffset(nn.Module):
    """One branch and, as a constant, what the others say: its Hessian is that branch's block."""

    def __init__(self, branch: nn.Module, offset: Tensor) -> None:
        super().__init__()
        self.branch, self.offset = branch, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.offset


class Surrogate(nn.Module):
    """All branches, each with the others as constants: the Hessian of the sum of their losses is block diagonal."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        v = torch.stack([branch(x) for branch in self.branches])
        return (v + (v.sum(0) - v).detach()).flatten(0, 1)  # (M N, C)


def curvlinops_by_branch(problem: Problem) -> list[object]:
    """An operator a branch."""
    from curvlinops import HessianLinearOperator

    with torch.no_grad():
        outputs = torch.stack([branch(problem.x) for branch in problem.branches])
    models = [WithOffset(own, outputs.sum(0) - v) for own, v in zip(problem.branches, outputs, strict=True)]
    data = [(problem.x, problem.y)]
    arguments = [(model, nn.CrossEntropyLoss(), list(model.branch.parameters()), data) for model in models]
    return [HessianLinearOperator(*own, check_deterministic=False) for own in arguments]


def own_products(problem: Problem) -> Columns:
    net = bsfast.fuse(problem.branches).eval()
    data = problem.x, problem.y
    H = HessianOperator(net, F.cross_entropy, data, coupling="block_diag", check_deterministic=False)
    return lambda U: H @ U


def branch_products(problem: Problem) -> Columns:
    operators = curvlinops_by_branch(problem)
    return lambda U: torch.cat([own @ u for own, u in zip(operators, U.chunk(len(operators)), strict=True)])


def surrogate_products(problem: Problem) -> Columns:
    from curvlinops import HessianLinearOperator

    net = Surrogate(problem.branches)
    samples, M = len(problem.y), len(problem.branches)

    data = [(problem.x, problem.y.repeat(M))]
    H = HessianLinearOperator(net, nn.CrossEntropyLoss(reduction="sum"), list(net.parameters()), data,
                              check_deterministic=False)  # fmt: skip
    return lambda U: (H @ U) / samples


def own_eigenvalues(problem: Problem, k: int) -> Tensor:
    """The k largest of every branch, ``(M, k)``."""
    net = bsfast.fuse(problem.branches).eval()
    data = problem.x, problem.y
    H = HessianOperator(net, F.cross_entropy, data, coupling="block_diag", check_deterministic=False)
    return eigsh(H, k, which="LA", tol=1e-3).values


def scipy_eigenvalues(problem: Problem, k: int) -> Tensor:
    """The same by SciPy on curvlinops' operators, one branch after the other."""
    from scipy.sparse.linalg import eigsh as scipy_eigsh

    values = [scipy_eigsh(own.to_scipy(), k, which="LA", tol=1e-3)[0][::-1].copy()
              for own in curvlinops_by_branch(problem)]  # fmt: skip
    return torch.stack([torch.from_numpy(own) for own in values])


MATRICES: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    OWN: own_matrix,
    f"loop, {HAND}": loop_by_hand,
    f"loop{LAST}, {HAND}": lambda problem: loop_by_hand(problem, torch.channels_last),
    f"grouped, {HAND}": lambda problem: grouped_by_hand(problem, torch.contiguous_format),
    f"grouped{LAST}, {HAND}": lambda problem: grouped_by_hand(problem, torch.channels_last),
    **({"BackPACK SqrtGGNExact and GEMM": backpack_matrix} if BACKPACK else {}),
}
SINGLE_COLUMNS: dict[str, Callable[[Problem], Columns]] = {
    "autograd, a column at a time": autograd_columns,
    "torch.func.hessian, a column at a time": functional_columns,
    **({"curvlinops": curvlinops_columns} if CURVLINOPS else {}),
}
PRODUCTS: dict[str, Callable[[Problem], Columns]] = {
    OWN: own_products,
    **({"curvlinops, an operator a branch": branch_products} if CURVLINOPS else {}),
    **({"curvlinops, surrogate loss": surrogate_products} if CURVLINOPS else {}),
}
EIGENVALUES: dict[str, Callable[[Problem, int], Tensor]] = {
    OWN: own_eigenvalues,
    **({"SciPy on curvlinops, an operator a branch": scipy_eigenvalues} if CURVLINOPS else {}),
}
