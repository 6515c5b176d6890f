"""What to do about a step that failed for a reason outside its operation: devices, memory."""

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from bsfast.fuse.values import PerBranch, leaves_of

LESS_MEMORY: Final = (
    "; take fewer samples at once, fuse fewer branches at a time, or keep activations in 16 bits by torch.autocast; "
    "evaluate under torch.no_grad()"
)


def advice(error: Exception, net: nn.Module, given: Any) -> str:
    """Say what to do.

    Args:
        error: That a step raised.
        net: The network.
        given: Nested arguments of the step.

    Returns:
        The end of a sentence, or nothing where the error says it all.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return LESS_MEMORY
    values = (leaf.tensor if isinstance(leaf, PerBranch) else leaf for leaf in leaves_of(given))
    inputs, own = _devices(values), _devices((*net.parameters(), *net.buffers()))
    if len({*inputs, *own}) < 2:
        return ""
    return (
        f"; the network is on {' and '.join(own) or 'no device'} and what the node takes on {' and '.join(inputs)}: "
        "move all to one device by .to(device)"
    )


def _devices(values: Iterable[Any]) -> list[str]:
    """Devices of tensors; numbers in tensors, which may be on any, do not count."""
    return sorted({str(value.device) for value in values if isinstance(value, Tensor) and value.dim()})
