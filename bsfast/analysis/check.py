"""Checks that the functions of this package share."""

import torch
from torch import Tensor


def check_real(function: str, argument: str, x: Tensor) -> None:
    """Refuse what is no tensor, is not of a real dtype, is empty, or holds NaN or infinity."""
    check_tensor(function, argument, x)
    if x.dtype not in {torch.float32, torch.float64}:
        raise TypeError(f"{function}: {argument} must be float32 or float64, got {x.dtype}; call .float() first")
    if x.numel() == 0:
        raise ValueError(f"{function}: {argument} must not be empty, got {shape_of(x)}")
    if not (finite := x.isfinite()).all():
        raise ValueError(f"{function}: {argument} must be finite, got {int((~finite).sum())} NaN or infinite values")


def check_tensor(function: str, argument: str, x: object) -> None:
    """Refuse lists and arrays, whose dtype and device are not those of the caller's tensors."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {argument} must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor")


def check_labels(function: str, labels: Tensor, shape: tuple[int, ...], device: torch.device, bound: int | None) -> int:
    """Check labels against the shape and number of classes they index; return that number."""
    check_tensor(function, "labels", labels)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{function}: labels must be integers, got {labels.dtype}")
    if tuple(labels.shape) != tuple(shape) or labels.device != device:
        raise ValueError(
            f"{function}: labels must have shape {tuple(shape)} on {device}, got {shape_of(labels)} on {labels.device}"
        )
    low, high = (int(label) for label in labels.aminmax())
    bound = high + 1 if bound is None else bound
    if low < 0 or high >= bound:
        raise ValueError(f"{function}: labels must be in [0, {bound}), got {low if low < 0 else high}")
    return bound


def shape_of(x: Tensor) -> tuple[int, ...]:
    """Shape as a plain tuple, for messages."""
    return tuple(x.shape)
