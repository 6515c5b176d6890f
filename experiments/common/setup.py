"""The choices of a run: to its record and back, and completed for the device that is there."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class BaseSetup:
    """What a dataclass of choices can do; each is a number, text, None, or a tuple of these."""

    def to_json(self) -> dict[str, Any]:
        """Every choice by its name."""
        return asdict(self)

    @classmethod
    def from_json(cls, choices: dict[str, Any]) -> Self:
        """Undo :meth:`to_json`.

        Args:
            choices: What a run's record holds.

        Returns:
            The setup.

        Raises:
            ValueError: If a choice is missing.
        """
        names = [entry.name for entry in fields(cls)]
        missing = [name for name in names if name not in choices]
        if missing:
            raise ValueError(f"Setup.from_json: choices must have {', '.join(missing)}, got {', '.join(choices)}")
        values = {name: choices[name] for name in names}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def resolve_budget(budget: str) -> str:
    """Replace ``"auto"``: by gpu where there is a CUDA device, else by cpu."""
    import torch

    if budget == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return budget


def fit_to_device(choices: dict[str, Any], budget: str) -> dict[str, Any]:
    """Check that the device is there; replace the precision ``"half"`` by its fast 16-bit type, on a CPU by fp32.

    Args:
        choices: With ``device``, and perhaps ``precision``.
        budget: Where they are from.

    Returns:
        The choices.

    Raises:
        RuntimeError: If the device is not there.
    """
    import torch

    device = choices["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"choose: budget {budget!r} with device 'cuda' needs a CUDA device, and this PyTorch finds none; "
            "add --device cpu, or take --budget cpu"
        )
    if choices.get("precision") != "half":
        return choices
    # PyTorch emulates bfloat16 slowly on Volta and Turing.
    half = "fp32" if device == "cpu" else "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return choices | {"precision": half}
