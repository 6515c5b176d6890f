"""How a chain of steps runs as one, and when it cannot."""

from typing import Any

import torch
from torch import Tensor, nn

from bsfast.fuse.chains import Chain
from bsfast.fuse.steps import module_at
from bsfast.fuse.values import PerBranch
from bsfast.nn import BatchNorm, Conv2d, joined


def why_apart(chain: Chain, net: nn.Module, x: Any, residual: Any) -> str | None:  # noqa: PLR0911 (one a reason)
    """Say why the steps of a chain must run one by one, or None if one kernel can take its values.

    Args:
        chain: The chain.
        net: The module tree.
        x: Its input.
        residual: The other value of its sum, or None.

    Returns:
        The reason, or None.
    """
    if torch.compiler.is_compiling():
        return "torch.compile takes the parts"
    modules = {part.target: module_at(net, part.target) for part in chain.parts if part.op == "call_module"}
    if any(is_watched(module) for module in modules.values()):
        return "a hook watches a part"
    types = {chain.norm: BatchNorm, chain.conv: Conv2d}
    if any(type(module) is not types.get(path, nn.ReLU) for path, module in modules.items()):
        return "another module took the place of a part"
    norm, conv = layers(chain, net)
    if norm is not None and not isinstance(norm.settings, nn.BatchNorm2d):
        return "not a normalisation of images"
    shared = not chain.norm_first and not isinstance(x, PerBranch)
    tensor = x if shared else getattr(x, "tensor", None)
    if not isinstance(tensor, Tensor) or tensor.dim() != (4 if shared else 5):
        return "the input is no image of each branch"
    if residual is not None and not (isinstance(residual, PerBranch) and _alike(residual.tensor, tensor)):
        return "the other value of the sum is of another kind"
    if conv is None:
        same = residual is None or residual.tensor.shape == tensor.shape
        return None if same else "the other value of the sum has another shape"
    if chain.describes:
        return joined.why_not_norm_conv2d(tensor, norm, conv, relu=chain.relu)
    return joined.why_not_conv2d_norm(tensor, conv, norm, None if residual is None else residual.tensor)


def can_run(chain: Chain, net: nn.Module, x: Any, residual: Any) -> bool:
    """Whether :func:`run` can take a chain's values; arguments as there."""
    tensors = [value.tensor if isinstance(value, PerBranch) else value for value in (x, residual)]
    has_memory = all(joined.has_memory(t) for t in tensors if t is not None)
    return has_memory and why_apart(chain, net, x, residual) is None


def run(chain: Chain, net: nn.Module, x: Any, residual: Any) -> PerBranch:
    """Compute a chain as one, where :func:`can_run` allows it.

    Args:
        chain: The chain.
        net: The module tree.
        x: Its input.
        residual: The other value of its sum, or None.

    Returns:
        The value of its last step.
    """
    norm, conv = layers(chain, net)
    tensor, moments = (x.tensor, x.moments) if isinstance(x, PerBranch) else (x, None)
    other = None if residual is None else residual.tensor
    if conv is None:
        layer: nn.Module = module_at(net, chain.parts[0].target)
        return PerBranch(layer(tensor, residual=other, relu=chain.relu, moments=moments))
    if chain.describes:
        y, own_moments, passed = joined.norm_conv2d(tensor, norm, conv, relu=chain.relu, moments=moments)
        if isinstance(x, PerBranch):
            x.tensor = passed  # the gradients of later users are added as the convolution's is stored
        return PerBranch(y, own_moments)
    return PerBranch(joined.conv2d_norm(tensor, conv, norm, other, relu=chain.relu))


def layers(chain: Chain, net: nn.Module) -> tuple[BatchNorm | None, Conv2d | None]:
    """Normalisation and convolution of a chain."""
    norm: Any = None if chain.norm is None else module_at(net, chain.norm)
    conv: Any = None if chain.conv is None else module_at(net, chain.conv)
    return norm, conv


def is_watched(module: nn.Module) -> bool:
    """Whether hooks expect the module's own input, output or gradients."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(own) or any(getattr(nn.modules.module, f"_global_{name}") for name in names)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device
