"""What trainings share: they can be stopped and continued without a change, and compute in 16 bits.

Every random number is a function of the seed and the step, so a training that was killed and continued takes the very
steps of one that was not.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.common.checkpoint import load_checkpoint, save_checkpoint
from experiments.common.interrupt import Stopped, stop_request

# The host looks at the losses this often: on an accelerator each look is a wait for all work under way.
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 20}
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Training(ABC):
    """The state of a training and how to drive, save and restore it; what a step does is of the subclass.

    Args:
        options: How to train, a dataclass with ``precision`` and ``save_seconds`` among others.
        history: What happens, a dataclass with ``steps``, ``seconds`` and ``ended_by`` among others.
        images: Number of training images.
        checkpoint: File that holds all that is needed to go on, or None.
        identity: Whose checkpoint that is.
        device: ``"cpu"`` or ``"cuda"``.

    Attributes:
        total_steps: Steps that there are at most; set by the subclass, as ``parts``.
        parts: Networks, optimisers and scalers by their names in a checkpoint, or lists and dicts of these.
        sums: Of the losses of the ``summed`` steps since the last entry of the history, as :meth:`look` adds them.
        unseen: Losses that the host has not looked at yet.
        latest: What the progress bar shows.
    """

    total_steps: int
    parts: dict[str, Any]

    def __init__(
        self, options: Any, history: Any, images: int, checkpoint: Path | None, identity: dict[str, Any], device: str
    ) -> None:
        self.options, self.history, self.device = options, history, device
        self.checkpoint, self.identity = checkpoint, full_identity(identity, options, images)
        self.sums: dict[str, Any] = {}
        self.summed = 0
        self.unseen: list[Any] = []
        self.latest: dict[str, str] = {}
        self.saved_step: int | None = None
        self.last_save = time.perf_counter()
        self.started = time.perf_counter()

    @abstractmethod
    def steps(self) -> Iterator[dict[str, Any] | None]:
        """Take the remaining steps; after each, yield an entry of the history if one is due, else None."""

    @abstractmethod
    def look(self) -> None:
        """Add the unseen losses to the sums, and refuse those that are not finite."""

    @abstractmethod
    def line(self, entry: dict[str, Any]) -> str:
        """Say what an entry of the history says."""

    def run(
        self, name: str, observe: Callable[[], dict[str, Any]] | None, log: Callable[[dict[str, Any]], None] | None
    ) -> Any:
        """Take all steps, from those of the checkpoint on.

        Args:
            name: Label of the progress bar.
            observe: Called at each entry of the history, and adds to it.
            log: Called with each entry.

        Returns:
            The history.

        Raises:
            RuntimeError: If a loss or parameter stops being finite, or a checkpoint cannot be written.
            Stopped: After Ctrl-C or SIGTERM; the state is saved if there is a checkpoint.
        """
        self._restore()
        with (
            stop_request() as asked,
            tqdm(total=self.total_steps, initial=self.history.steps, desc=name, disable=None) as bar,
        ):
            for entry in self.steps():
                if entry is not None:
                    if observe is not None:
                        entry.update(observe())
                    bar.write(f"{name}: {self.line(entry)}")
                    if log is not None:
                        log(entry)
                self._save(force=entry is not None or bool(self.history.ended_by) or asked())
                bar.set_postfix(self.latest, refresh=False)
                bar.update(self.history.steps - bar.n)
                if asked():
                    raise Stopped(f"{name} stopped at step {self.history.steps} of {self.total_steps}")
        return self.history

    def take_time(self) -> None:
        """Bring the history's time up to date."""
        self.history.seconds = time.perf_counter() - self.started

    def autocast(self) -> torch.autocast:
        """Make the context in which networks compute in the precision chosen."""
        half = _HALF.get(self.options.precision)
        return torch.autocast(self.device, dtype=half, enabled=half is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Make a scaler of losses, which does something in fp16 only."""
        return torch.amp.GradScaler(self.device, enabled=self.options.precision == "fp16")

    def last_good(self) -> str:
        """Say for an error where the last good state is."""
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good state, of step {self.saved_step}, is in {self.checkpoint}"

    def _save(self, *, force: bool) -> None:
        """Write the checkpoint if it is time to, or at once."""
        due = time.perf_counter() - self.last_save >= self.options.save_seconds
        if self.checkpoint is None or not (force or due):
            return
        self.look()
        state = _state(self.parts)
        if not all(tensor.isfinite().all() for tensor in _tensors(state)):  # which the losses need not show
            raise RuntimeError(
                f"train: the parameters must stay finite, and are not after step {self.history.steps}; "
                f"{self.last_good()}; lower the learning rate"
            )
        state |= {"history": asdict(self.history), "sums": self.sums, "summed": self.summed}
        save_checkpoint(self.checkpoint, state, self.identity)
        self.saved_step, self.last_save = self.history.steps, time.perf_counter()

    def _restore(self) -> None:
        """Continue from the checkpoint if there is one."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        state = load_checkpoint(self.checkpoint, self.identity, device=self.device)
        _load(self.parts, state)
        self.history = type(self.history)(**state["history"])
        self.sums, self.summed = state["sums"], state["summed"]
        self.saved_step = self.history.steps
        self.started = time.perf_counter() - self.history.seconds


def full_identity(identity: dict[str, Any], options: Any, images: int) -> dict[str, Any]:
    """What a checkpoint of a training belongs to: whose it is, its options, and the number of its images."""
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    return identity | {"training": own | {"save_seconds": None, "images": images}}


def _state(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _state(own) for name, own in part.items()}
    return [_state(own) for own in part] if isinstance(part, list) else part.state_dict()


def _load(part: Any, state: Any) -> None:
    if isinstance(part, dict | list):
        for name, own in part.items() if isinstance(part, dict) else enumerate(part):
            _load(own, state[name])
    else:
        part.load_state_dict(state)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list):
        for own in state.values() if isinstance(state, dict) else state:
            yield from _tensors(own)
