"""What the device can do."""

from __future__ import annotations


def half_precision(device: str) -> str:
    """Name the 16-bit type that a device computes fast in: ``"bf16"``, ``"fp16"``, or ``"fp32"`` on a CPU."""
    import torch

    if device == "cpu":
        return "fp32"
    # PyTorch emulates bfloat16 slowly on Volta and Turing.
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
