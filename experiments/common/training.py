"""The training loop for image classifiers: SGD, a cosine schedule, checkpoints, and a resume that changes nothing.

Every random number is a function of the seed and the step, so a training that was killed and continued takes the very
steps of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.common.augment import augment, normalise
from experiments.common.checkpoint import load_checkpoint, save_checkpoint
from experiments.common.interrupt import Stopped, stop_request
from experiments.common.streams import stream

Scores = dict[str, Tensor]
_ORDER, _AUGMENTATION = 0, 1
# The host looks at the losses this often: on an accelerator each look is a wait for all work under way.
_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 20}
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step.
        lr: Peak learning rate.
        momentum: Of SGD.
        weight_decay: L2 factor on all parameters.
        warmup: Share of the training in which the learning rate rises linearly from 0 to its peak.
        time_limit: Wall-clock limit in s, or None; the schedule shrinks so that it ends at the limit.
        flip: Whether images are flipped left to right at random.
        pad: Pixels of black border for random crops.
        seed: Seed of the batches' order and the augmentation.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"``; the latter scales the loss.
        save_seconds: Time between checkpoints, in s; there is one after every epoch as well.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 2 / 30
    time_limit: float | None = None
    flip: bool = True
    pad: int = 4
    seed: int = 0
    precision: str = "fp32"
    save_seconds: float = 60.0


@dataclass
class History:
    """What happened.

    Attributes:
        epochs: One entry an epoch, the last one perhaps of fewer steps: ``epoch`` (from 1), ``steps`` so far, ``lr`` at
            its end, ``seconds`` so far, each score's mean over the epoch by its name, and what ``evaluate`` returned;
            scores are lists with one number a model.
        steps: Optimiser steps taken in all.
        seconds: Wall-clock time in all, in s.
        ended_by: ``"epochs"``, ``"time limit"``, or ``""`` while it goes on.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    ended_by: str = ""

    def course(self, name: str, model: int = 0) -> list[float]:
        """One score of one model, epoch by epoch."""
        return [entry[name][model] for entry in self.epochs]


def train(
    net: nn.Module,
    score: Callable[[Tensor, Tensor], Scores],
    images: Tensor,
    labels: Tensor,
    *,
    options: Options,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    evaluate: Callable[[], dict[str, list[float]]] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    name: str = "training",
) -> History:
    """Train one network, or several that share a module but no parameters, in place.

    Args:
        net: Has ``branch_outputs``, which maps normalised images ``(N, 3, H, W)`` to ``(M, N, C)``.
        score: Maps branch outputs and labels ``(N,)`` to means over the batch, each of shape ``(models,)``; the sum of
            those named ``"loss"`` is minimised.
        images: Pixels, uint8, shape ``(N, 3, H, W)``, on the network's device.
        labels: Class indices, int64, shape ``(N,)``, likewise.
        options: How to train.
        checkpoint: File that holds all that is needed to go on; if it exists, training goes on from it.
        identity: Whose checkpoint that is; one of another identity is refused.
        evaluate: Called after each epoch; its result becomes part of the history.
        log: Called with each epoch's entry.
        name: Label of the progress bar.

    Returns:
        What happened.

    Raises:
        ValueError: If images and labels differ in number or there are none, or the checkpoint is not this training's.
        RuntimeError: If a loss stops being finite (names the step and the last checkpoint), or a checkpoint cannot be
            written.
        Stopped: After Ctrl-C or SIGTERM; the state is saved if there is a checkpoint.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"train: images and labels must be as many and at least 1, got {len(images)} and {len(labels)}"
        )
    run = _Training(net, score, images, labels, options, checkpoint, identity or {})
    run.restore()
    net.train()
    with (
        stop_request() as asked,
        tqdm(total=run.total_steps, initial=run.history.steps, desc=name, disable=None) as bar,
    ):
        for entry in run.steps():
            if entry is not None:
                if evaluate is not None:
                    entry.update(evaluate())
                    net.train()
                bar.write(f"{name}: {_line(entry, options.epochs)}")
                if log is not None:
                    log(entry)
            run.save(force=entry is not None or bool(run.history.ended_by) or asked())
            bar.update(run.history.steps - bar.n)
            if asked():
                raise Stopped(f"{name} stopped at step {run.history.steps} of {run.total_steps}")
    return run.history


class _Training:
    """The state of a training and how to save, restore and advance it."""

    def __init__(
        self,
        net: nn.Module,
        score: Callable[[Tensor, Tensor], Scores],
        images: Tensor,
        labels: Tensor,
        options: Options,
        checkpoint: Path | None,
        identity: dict[str, Any],
    ) -> None:
        self.net, self.score, self.images, self.labels, self.options = net, score, images, labels, options
        self.checkpoint = checkpoint
        self.identity = identity | {"training": {**asdict(options), "save_seconds": None, "images": len(images)}}
        self.device = next(net.parameters()).device.type
        self.optimizer = torch.optim.SGD(
            net.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device, enabled=options.precision == "fp16")
        self.batch_size = min(options.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.total_steps = options.epochs * self.steps_per_epoch
        self.history = History()
        self.sums: dict[str, list[float]] = {}  # of the scores of the epoch's steps so far, float64
        self.summed = 0
        self.unseen: list[tuple[int, float, Scores]] = []
        self.rate = 0.0
        self.saved_step: int | None = None
        self.last_save = time.perf_counter()
        self.started = time.perf_counter()

    def steps(self) -> Iterator[dict[str, Any] | None]:
        """Take the remaining steps; after each, yield the epoch's entry if it ended one, else None."""
        history, options = self.history, self.options
        order: Tensor | None = None
        while not history.ended_by:
            history.seconds = time.perf_counter() - self.started
            progress = (history.steps + 0.5) / self.total_steps
            if options.time_limit is not None:
                progress = max(progress, history.seconds / options.time_limit)
            if progress >= 1:
                history.ended_by = "epochs" if history.steps == self.total_steps else "time limit"
                yield self._close_epoch() if self.summed else None
                return
            epoch, index = divmod(history.steps, self.steps_per_epoch)
            if order is None or index == 0:
                order = torch.randperm(len(self.images), generator=stream(options.seed, _ORDER, epoch))
            rate = options.lr * schedule(progress, warmup=options.warmup)
            self._step(order[index * self.batch_size : (index + 1) * self.batch_size], rate)
            history.steps += 1
            self.summed += 1
            self.rate = rate
            last = index + 1 == self.steps_per_epoch
            if last or len(self.unseen) >= _STEPS_BETWEEN_LOOKS[self.device]:
                self._look()
            if history.steps == self.total_steps:
                history.ended_by = "epochs"
            yield self._close_epoch() if last else None

    def _step(self, indices: Tensor, rate: float) -> None:
        options = self.options
        generator = stream(options.seed, _AUGMENTATION, self.history.steps)
        indices = indices.to(self.device)
        batch = normalise(augment(self.images[indices], generator=generator, pad=options.pad, flip=options.flip))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        half = _HALF.get(options.precision)
        with torch.autocast(self.device, dtype=half, enabled=half is not None):
            outputs = self.net.branch_outputs(batch)
        scores = self.score(outputs.float(), self.labels[indices])
        self.unseen.append((self.history.steps, rate, {name: value.detach() for name, value in scores.items()}))
        if self.device == "cpu":
            self._look()  # before a loss that is not finite can spoil the parameters
        self.scaler.scale(scores["loss"].sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _look(self) -> None:
        """Add the scores since the last look to the sums, and refuse losses that are not finite."""
        for step, rate, scores in self.unseen:
            numbers = {name: value.double().tolist() for name, value in scores.items()}
            if not all(map(math.isfinite, numbers["loss"])):
                at = ", ".join(f"{value:.4g}" for value in numbers["loss"])
                raise RuntimeError(
                    f"train: the loss must stay finite, got {at} at step {step} (epoch "
                    f"{step // self.steps_per_epoch + 1}, learning rate {rate:.3g}); {self._last_good()}; lower the "
                    "learning rate"
                )
            for name, values in numbers.items():
                before = self.sums.get(name, [0.0] * len(values))
                self.sums[name] = [total + value for total, value in zip(before, values, strict=True)]
        self.unseen.clear()

    def _refuse_spoilt(self) -> None:
        """Refuse to save parameters that are not finite, which a clamped loss need not show."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [t for t in (*self.net.state_dict().values(), *moments) if isinstance(t, Tensor)]
        if not all(t.isfinite().all() for t in tensors):
            raise RuntimeError(
                f"train: the parameters must stay finite, and are not after step {self.history.steps}; "
                f"{self._last_good()}; lower the learning rate"
            )

    def _last_good(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good state, of step {self.saved_step}, is in {self.checkpoint}"

    def _close_epoch(self) -> dict[str, Any]:
        self._look()
        self.history.seconds = time.perf_counter() - self.started
        entry = {
            "epoch": len(self.history.epochs) + 1,
            "steps": self.history.steps,
            "lr": self.rate,
            "seconds": self.history.seconds,
            **{name: [total / self.summed for total in totals] for name, totals in self.sums.items()},
        }
        self.history.epochs.append(entry)
        self.sums, self.summed = {}, 0
        return entry

    def save(self, *, force: bool) -> None:
        """Write the checkpoint if it is time to, or at once."""
        due = time.perf_counter() - self.last_save >= self.options.save_seconds
        if self.checkpoint is None or not (force or due):
            return
        self._look()
        self._refuse_spoilt()
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": asdict(self.history),
            "sums": self.sums,
            "summed": self.summed,
        }
        save_checkpoint(self.checkpoint, state, self.identity)
        self.saved_step, self.last_save = self.history.steps, time.perf_counter()

    def restore(self) -> None:
        """Continue from the checkpoint if there is one."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        state = load_checkpoint(self.checkpoint, self.identity, device=self.device)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.history = History(**state["history"])
        self.sums, self.summed = state["sums"], state["summed"]
        self.saved_step = self.history.steps
        self.started = time.perf_counter() - self.history.seconds


def schedule(progress: float, *, warmup: float) -> float:
    """Scale of the learning rate: linear from 0 to 1 during the warm-up, then half a cosine down to 0.

    Args:
        progress: Share of the training done, 0 to 1.
        warmup: Share of the training that is warm-up, 0 to 1.

    Returns:
        Factor on the peak learning rate.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def branch_responses(net: nn.Module, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """Compute what every branch says about every image, in eval mode, without gradients.

    Args:
        net: Has ``branch_outputs``, which maps ``(N, 3, H, W)`` to ``(M, N, C)``.
        images: Pixels, uint8, shape ``(N, 3, H, W)``.
        batch_size: Images at a time.

    Returns:
        Branch outputs on the CPU, shape ``(M, N, C)``.
    """
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    with torch.no_grad():
        parts = [net.branch_outputs(normalise(batch.to(device))).float().cpu() for batch in images.split(batch_size)]
    net.train(was_training)
    return torch.cat(parts, dim=1)


def _line(entry: dict[str, Any], epochs: int) -> str:
    scores = [
        f"{name.replace('_', ' ')} {_numbers(values)}" for name, values in entry.items() if isinstance(values, Sequence)
    ]
    return f"epoch {entry['epoch']} of {epochs}, {', '.join(scores)}, {entry['seconds']:.0f} s"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
