"""Checks of operator arguments, once, before any work; messages name what was expected and what came."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


def pair(function: str, name: str, value: Any, lowest: int) -> Pair:
    """Return ``value`` as a pair of ints.

    Args:
        function: Name of the public function, for the message.
        name: Name of the argument, for the message.
        value: An int or a pair of ints.
        lowest: Smallest value allowed.

    Returns:
        The pair.

    Raises:
        ValueError: If it is neither, or too small.
    """
    values = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) != 2 or not all(isinstance(entry, (int, torch.SymInt)) for entry in values):
        raise ValueError(f"{function}: {name} must be an int or a pair of ints, got {value!r}")
    if min(values) < lowest:
        raise ValueError(f"{function}: {name} must be at least {lowest}, got {value!r}")
    return values[0], values[1]


def geometry(function: str, stride: Any, padding: Any, dilation: Any, groups: Any) -> tuple[Pair, Pair, Pair, int]:
    """Check the settings of a convolution by themselves and return them as pairs.

    Args:
        function: Name of the public function, for the message.
        stride: An int or a pair, at least 1.
        padding: An int or a pair, at least 0.
        dilation: An int or a pair, at least 1.
        groups: At least 1.

    Returns:
        Stride, padding, dilation and groups.

    Raises:
        ValueError: If one does not fit.
    """
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{function}: groups must be an int of at least 1, got {groups!r}")
    pairs = pair(function, "stride", stride, 1), pair(function, "padding", padding, 0)
    return *pairs, pair(function, "dilation", dilation, 1), groups


def same_kind(function: str, **tensors: Tensor) -> None:
    """Check that two tensors are of one floating-point dtype and on one device.

    Args:
        function: Name of the public function, for the message.
        tensors: Two tensors by name of the argument.

    Raises:
        TypeError: If they are not.
    """
    (name, tensor), (other_name, other) = tensors.items()
    for each, value in tensors.items():
        if not value.is_floating_point():
            raise TypeError(f"{function}: {each} must be a floating-point tensor, got {value.dtype}")
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise TypeError(
            f"{function}: {name} must have {other_name}'s dtype and device ({other.dtype}, {other.device}), "
            f"got ({tensor.dtype}, {tensor.device})"
        )


def conv2d_shapes(
    function: str,
    x: Sequence[int],
    weight: Sequence[int],
    padding: Pair,
    dilation: Pair,
    groups: int,
    x_name: str = "x",
) -> None:
    """Check the shapes of a convolution's operands against each other.

    Args:
        function: Name of the public function, for the message.
        x: Shape of the input.
        weight: Shape of the stacked weights.
        padding: Checked already.
        dilation: Checked already.
        groups: Checked already.
        x_name: What the function calls the input, or its shape.

    Raises:
        ValueError: If a shape does not fit.
    """
    x, weight = tuple(x), tuple(weight)
    if len(x) not in {4, 5}:
        raise ValueError(f"{function}: {x_name} must have shape (M, N, C_in, H, W) or (N, C_in, H, W), got {x}")
    if x[-3] < 1 or x[-3] % groups:
        raise ValueError(f"{function}: groups must divide C_in={x[-3]} (at least 1), got {groups}")
    channels, branches = x[-3] // groups, f"M={x[0]}" if len(x) == 5 else "M"
    if len(weight) != 5 or min(weight) < 1 or weight[2] != channels or (len(x) == 5 and weight[0] != x[0]):
        wanted = f"({branches}, C_out, C_in={channels}, kH, kW)"
        raise ValueError(f"{function}: weight must have shape {wanted}, none of them 0, got {weight}")
    if weight[1] % groups:
        raise ValueError(f"{function}: groups must divide C_out={weight[1]}, got {groups}")
    for axis, name in ((-2, "H"), (-1, "W")):
        reach = dilation[axis] * (weight[axis] - 1) + 1
        if x[axis] + 2 * padding[axis] < reach:
            raise ValueError(
                f"{function}: {x_name} must have {name} + 2 * padding >= {reach} for this kernel, got {name}={x[axis]} "
                f"and padding {padding[axis]}"
            )
