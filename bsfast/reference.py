"""The specification of a branched network: a Python loop over branches. Imports torch only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


class ReferenceBranched(nn.Module):
    """f(x) = v_1(x) + ... + v_M(x), one branch after the other, as plain PyTorch runs it.

    It holds the given modules themselves, not copies.

    Args:
        branches: M modules.

    Raises:
        ValueError: If there is no branch.

    Source: Brokman & Gilboa (2022), arXiv 2206.05810, eq. 1.

    Example:
        >>> net = ReferenceBranched([nn.Linear(3, 2) for _ in range(4)])
        >>> net(torch.ones(5, 3)).shape, net.branch_outputs(torch.ones(5, 3)).shape
        (torch.Size([5, 2]), torch.Size([4, 5, 2]))
    """

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        if not branches:
            raise ValueError("ReferenceBranched: branches must hold at least one module, got none")
        self.branches = nn.ModuleList(branches)

    def branch_outputs(self, *inputs: Any, per_branch: bool | Sequence[bool] = False, **named: Any) -> Any:
        """Return v_k(x) of all branches.

        Args:
            *inputs: What one branch takes; tensors shared by all branches, or stacked along a leading axis of length M.
            per_branch: Whether tensors are stacked, for all inputs or for each positional one.
            **named: As ``inputs``, by name; stacked only if ``per_branch`` is True.

        Returns:
            As one branch returns, each tensor with a leading axis of length M.
        """
        flags = per_branch if isinstance(per_branch, Sequence) else [per_branch] * len(inputs)
        named_flag = per_branch is True
        outputs = []
        for k, branch in enumerate(self.branches):
            own = [_take(value, k) if flag else value for value, flag in zip(inputs, flags, strict=True)]
            own_named = {name: _take(value, k) if named_flag else value for name, value in named.items()}
            outputs.append(branch(*own, **own_named))
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *outputs)

    def forward(self, *inputs: Any, per_branch: bool | Sequence[bool] = False, **named: Any) -> Any:
        """Return f(x), the sum over branches; arguments as :meth:`branch_outputs`.

        Returns:
            As one branch returns.
        """
        return pytree.tree_map(lambda v: v.sum(0), self.branch_outputs(*inputs, per_branch=per_branch, **named))


def _take(value: Any, k: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[k] if isinstance(leaf, torch.Tensor) else leaf, value)
