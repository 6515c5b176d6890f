"""Checks of operator arguments, once, before any work; messages name what was expected and what came."""

from typing import Any

from torch import Tensor

Pair = tuple[int, int]


def pair(function: str, name: str, value: Any) -> Pair:
    """Return ``value`` as a pair of ints.

    Args:
        function: Name of the public function, for the message.
        name: Name of the argument, for the message.
        value: An int or a pair of ints.

    Returns:
        The pair.

    Raises:
        ValueError: If it is neither.
    """
    values = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) != 2 or not all(isinstance(entry, int) for entry in values):
        raise ValueError(f"{function}: {name} must be an int or a pair of ints, got {value!r}")
    lowest = 0 if name == "padding" else 1
    if min(values) < lowest:
        raise ValueError(f"{function}: {name} must be at least {lowest}, got {value!r}")
    return values[0], values[1]


def check_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> None:
    """Check the operands of a convolution against each other.

    Args:
        x: Input.
        weight: Stacked weights.
        stride: Checked already.
        padding: Checked already.
        dilation: Checked already.
        groups: Groups inside a branch.

    Raises:
        TypeError: If dtypes or devices differ or are not floating point.
        ValueError: If a shape does not fit.
    """
    if not x.is_floating_point():
        raise TypeError(f"conv2d: x must be a floating-point tensor, got {x.dtype}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(
            f"conv2d: x must have weight's dtype and device ({weight.dtype}, {weight.device}), got ({x.dtype}, {x.device})"
        )
    if x.dim() not in {4, 5}:
        raise ValueError(f"conv2d: x must have shape (M, N, C_in, H, W) or (N, C_in, H, W), got {tuple(x.shape)}")
    branches = x.shape[0] if x.dim() == 5 else None
    channels = x.shape[-3]
    if groups < 1 or channels % groups:
        raise ValueError(f"conv2d: groups must divide C_in={channels}, got {groups}")
    if weight.dim() != 5 or (branches is not None and weight.shape[0] != branches):
        stacked = "M" if branches is None else f"M={branches}"
        raise ValueError(
            f"conv2d: weight must have shape ({stacked}, C_out, C_in={channels // groups}, kH, kW), got {tuple(weight.shape)}"
        )
    if weight.shape[2] != channels // groups or weight.shape[1] % groups:
        raise ValueError(
            f"conv2d: weight must have C_in={channels // groups} and C_out divisible by groups={groups}, "
            f"got {tuple(weight.shape)}"
        )
    for axis, name in ((-2, "H"), (-1, "W")):
        reach = dilation[axis] * (weight.shape[axis] - 1) + 1
        if x.shape[axis] + 2 * padding[axis] < reach:
            raise ValueError(
                f"conv2d: x must have {name} + 2 * padding >= {reach} for this kernel, got {name}={x.shape[axis]} and "
                f"padding {padding[axis]}"
            )
