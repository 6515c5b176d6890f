"""Gradients of a composition of stock operators, where a fused operator's own backward cannot be used."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bsfast.ops.functorch import is_batched


def must_compose(*grads: Tensor | None) -> bool:
    """Whether a backward is to be differentiated itself, or has to take several gradients at once."""
    # Gradients are enabled in a backward exactly under create_graph.
    return torch.is_grad_enabled() or any(is_batched(grad) for grad in grads if grad is not None)


def composed_grads(
    function: Callable[..., Tensor], operands: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Differentiate a composition, in a way that can be differentiated again under ``create_graph``.

    Args:
        function: The composition.
        operands: Its arguments.
        needs: Whether the gradient of each is wanted.
        grad: Of the composition's result.

    Returns:
        A gradient, or None, for each operand.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Operands may have been computed from one another; their aliases have not, and each counts for itself.
        aliases = [t if t is None else t.view_as(t) if again else t.detach().requires_grad_() for t in operands]
        result = function(*aliases)
    wanted = [alias for alias, needed in zip(aliases, needs, strict=True) if needed and alias is not None]
    grads = iter(torch.autograd.grad(result, wanted, grad, create_graph=again) if wanted else ())
    return [next(grads) if needed and alias is not None else None for alias, needed in zip(aliases, needs, strict=True)]
