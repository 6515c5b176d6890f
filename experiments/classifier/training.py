"""The training loop of classifiers: SGD, a cosine schedule, and a time limit that the schedule fits itself to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common.augment import augment, normalise
from experiments.common.streams import stream
from experiments.common.training import STEPS_BETWEEN_LOOKS, Training

Scores = dict[str, Tensor]
_ORDER, _AUGMENTATION = 0, 1


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
    return _Training(net, score, images, labels, options, checkpoint, identity or {}).run(name, evaluate, log)


class _Training(Training):
    """The state of a classifier's training."""

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
        device = next(net.parameters()).device.type
        super().__init__(options, History(), len(images), checkpoint, identity, device)
        self.net, self.score, self.images, self.labels = net, score, images, labels
        self.optimizer = torch.optim.SGD(
            net.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.scaler = self.grad_scaler()
        self.parts = {"net": net, "optimizer": self.optimizer, "scaler": self.scaler}
        self.batch_size = min(options.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.total_steps = options.epochs * self.steps_per_epoch
        self.rate = 0.0

    def steps(self) -> Iterator[dict[str, Any] | None]:
        history, options = self.history, self.options
        order: Tensor | None = None
        while not history.ended_by:
            self.take_time()
            progress = (history.steps + 0.5) / self.total_steps
            if options.time_limit is not None:
                progress = max(progress, history.seconds / options.time_limit)
            if progress >= 1:
                history.ended_by = "epochs" if history.steps == self.total_steps else "time limit"
                yield self._close_epoch() if self.summed else None
                return
            epoch, index = divmod(history.steps, self.steps_per_epoch)
            if order is None or index == 0:
                self.net.train()
                order = torch.randperm(len(self.images), generator=stream(options.seed, _ORDER, epoch))
            rate = options.lr * schedule(progress, warmup=options.warmup)
            self._step(order[index * self.batch_size : (index + 1) * self.batch_size], rate)
            history.steps += 1
            self.summed += 1
            self.rate = rate
            last = index + 1 == self.steps_per_epoch
            if last or len(self.unseen) >= STEPS_BETWEEN_LOOKS[self.device]:
                self.look()
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
        with self.autocast():
            outputs = self.net.branch_outputs(batch)
        scores = self.score(outputs.float(), self.labels[indices])
        self.unseen.append((self.history.steps, rate, {name: value.detach() for name, value in scores.items()}))
        if self.device == "cpu":
            self.look()  # before a loss that is not finite can spoil the parameters
        self.scaler.scale(scores["loss"].sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def look(self) -> None:
        for step, rate, scores in self.unseen:
            numbers = {name: value.double().tolist() for name, value in scores.items()}
            if not all(map(math.isfinite, numbers["loss"])):
                at = ", ".join(f"{value:.4g}" for value in numbers["loss"])
                raise RuntimeError(
                    f"train: the loss must stay finite, got {at} at step {step} (epoch "
                    f"{step // self.steps_per_epoch + 1}, learning rate {rate:.3g}); {self.last_good()}; lower the "
                    "learning rate"
                )
            for name, values in numbers.items():
                before = self.sums.get(name, [0.0] * len(values))
                self.sums[name] = [total + value for total, value in zip(before, values, strict=True)]
        self.unseen.clear()

    def _close_epoch(self) -> dict[str, Any]:
        self.look()
        self.take_time()
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

    def line(self, entry: dict[str, Any]) -> str:
        scores = [
            f"{name.replace('_', ' ')} {_numbers(values)}"
            for name, values in entry.items()
            if isinstance(values, Sequence)
        ]
        return f"epoch {entry['epoch']} of {self.options.epochs}, {', '.join(scores)}, {entry['seconds']:.0f} s"


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


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
