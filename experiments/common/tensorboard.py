"""Optional TensorBoard logs of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def tensorboard_log(folder: Path, names: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """Open TensorBoard logs, one run a model, in ``folder/tensorboard``, by epoch or, where there is none, by step.

    Args:
        folder: Where the logs go.
        names: One name a model.

    Returns:
        A function that adds an entry, as the training loops hand it out.

    Raises:
        RuntimeError: If the package ``tensorboard`` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(f"--tensorboard needs the package tensorboard: pip install tensorboard ({error})") from None
    writers = [SummaryWriter(folder / "tensorboard" / name) for name in names]

    def log(entry: dict[str, Any]) -> None:
        for index, writer in enumerate(writers):
            for score, value in entry.items():
                number = value[index] if isinstance(value, list) else value
                if score not in {"epoch", "steps"}:
                    writer.add_scalar(score, number, entry.get("epoch", entry["steps"]))
            writer.flush()

    return log
