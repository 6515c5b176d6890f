"""The training loop of the two players."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.class_transfer.augment import augment, to_signal
from experiments.class_transfer.average import update_average
from experiments.class_transfer.decomposer import Decomposer
from experiments.class_transfer.loss import discriminator_loss, generator_loss, gradient_penalty
from experiments.common.streams import stream
from experiments.common.training import STEPS_BETWEEN_LOOKS, Training

_BATCH = 1  # purpose of a stream of random numbers


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        steps: Steps of each player.
        batch_size: Images a step.
        accumulation: Parts that a batch is computed in, one after the other, to save memory.
        lr: Learning rate of Adam, of both players.
        betas: Of Adam.
        weight_decay: L2 factor on all parameters.
        r1: Factor of the gradient penalty.
        average_decay: Of the moving average of the generator.
        smoother_clip: Largest norm of the gradient of a learnt smoother.
        time_limit: Wall-clock limit in s, or None.
        seed: Seed of the batches and their augmentation.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"``; the latter scales the losses.
        save_seconds: Time between checkpoints, in s.
        report_steps: Steps between entries of the history.
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 1e-4
    r1: float = 1.0
    average_decay: float = 0.999
    smoother_clip: float = 1.0
    time_limit: float | None = None
    seed: int = 0
    precision: str = "fp32"
    save_seconds: float = 60.0
    report_steps: int = 500


@dataclass
class History:
    """What happened.

    Attributes:
        entries: One every ``report_steps``: ``steps`` and ``seconds`` so far, the mean of each loss since the entry
            before by its name, and what ``observe`` returned.
        steps: Steps taken in all.
        seconds: Wall-clock time in all, in s.
        ended_by: ``"steps"``, ``"time limit"``, or ``""`` while it goes on.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    ended_by: str = ""


class Players(NamedTuple):
    """The networks of a training; ``average`` is what is evaluated."""

    decomposer: Decomposer
    discriminator: nn.Module
    average: Decomposer

    @classmethod
    def start(cls, decomposer: Decomposer, discriminator: nn.Module) -> Players:
        """Begin the average where the decomposer is."""
        return cls(decomposer, discriminator, copy.deepcopy(decomposer).requires_grad_(False))


def train(
    players: Players,
    images: Tensor,
    labels: Tensor,
    *,
    options: Options,
    checkpoint: Path | None = None,
    identity: dict[str, Any] | None = None,
    observe: Callable[[int], dict[str, float]] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    name: str = "training",
) -> History:
    """Train generator and discriminator, in place.

    Args:
        players: The networks.
        images: Pixels, uint8, shape ``(N, 3, H, W)``; moved to the networks' device batch by batch if elsewhere.
        labels: Class indices, int64, shape ``(N,)``, on the CPU; every class occurs.
        options: How to train.
        checkpoint: File that holds all that is needed to go on; if it exists, training goes on from it.
        identity: Whose checkpoint that is; one of another identity is refused.
        observe: Called with the step at each entry of the history, and adds numbers to it.
        log: Called with each entry.
        name: Label of the progress bar.

    Returns:
        What happened.

    Raises:
        ValueError: If images and labels differ in number, a class has no image, the batch cannot be split, or the
            checkpoint is not this training's.
        RuntimeError: If a loss stops being finite, or a checkpoint cannot be written.
        Stopped: After Ctrl-C or SIGTERM; the state is saved if there is a checkpoint.
    """
    run = _Training(players, images, labels, options, checkpoint, identity or {})
    return run.run(name, None if observe is None else lambda: observe(run.history.steps), log)


class _Training(Training):
    """The state of both players' training."""

    def __init__(
        self,
        players: Players,
        images: Tensor,
        labels: Tensor,
        options: Options,
        checkpoint: Path | None,
        identity: dict[str, Any],
    ) -> None:
        device = next(players.decomposer.parameters()).device.type
        super().__init__(options, History(), len(images), checkpoint, identity, device)
        self.players, self.images = players, images
        self.members = _members(images, labels, players.decomposer.num_classes, options)
        self.optimizers = [
            torch.optim.Adam(
                net.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, foreach=True
            )
            for net in (players.discriminator, players.decomposer)
        ]
        self.scalers = [self.grad_scaler() for _ in self.optimizers]
        self.parts = {"nets": players._asdict(), "optimizers": self.optimizers, "scalers": self.scalers}
        self.total_steps = options.steps

    def steps(self) -> Iterator[dict[str, Any] | None]:
        history, options = self.history, self.options
        while not history.ended_by:
            self.take_time()
            if history.steps >= options.steps:
                history.ended_by = "steps"
            elif options.time_limit is not None and history.seconds >= options.time_limit:
                history.ended_by = "time limit"
            if history.ended_by:
                yield self._close_entry() if self.summed else None
                return
            self.unseen.append(self._step(*self._batch(history.steps)))
            history.steps += 1
            self.summed += 1
            due = history.steps % options.report_steps == 0 or history.steps == options.steps
            if due or len(self.unseen) >= STEPS_BETWEEN_LOOKS[self.device]:
                self.look()
            yield self._close_entry() if due else None

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw real images, their classes and the classes to transfer to; each class is as likely as the others."""
        generator = stream(self.options.seed, _BATCH, step)
        count, classes = self.options.batch_size, len(self.members)
        source, target = torch.randint(classes, (2, count), generator=generator)
        place = torch.rand(count, generator=generator, dtype=torch.float64)
        chosen = torch.stack([
            self.members[c][int(share * len(self.members[c]))] for c, share in zip(source, place, strict=True)
        ])
        pixels = self.images[chosen.to(self.images.device)].to(self.device)
        return augment(to_signal(pixels), generator=generator), source.to(self.device), target.to(self.device)

    def _step(self, x: Tensor, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Improve the discriminator, then the generator, on one batch."""
        parts = list(zip(*(tensor.chunk(self.options.accumulation) for tensor in (x, source, target)), strict=True))
        keep = len(parts) == 1  # the generator's output serves both players; that of several parts would not fit
        losses: dict[str, Tensor] = {}
        transferred: list[Tensor | None] = []
        for part, own, wanted in parts:
            with torch.set_grad_enabled(keep), self.autocast():
                output = self.players.decomposer(part, wanted)
            transferred.append(output if keep else None)
            self._judge(part, own, output.detach(), wanted, losses, share=len(part) / len(x))
        self._update(0)
        self.players.discriminator.requires_grad_(False)
        for (part, _, wanted), output in zip(parts, transferred, strict=True):
            self._persuade(part, output, wanted, losses, share=len(part) / len(x))
        self.players.discriminator.requires_grad_(True)
        self._update(1)
        update_average(
            self.players.average,
            self.players.decomposer,
            decay=self.options.average_decay,
            step=self.history.steps,
        )
        return losses

    def _judge(
        self, x: Tensor, own: Tensor, output: Tensor, target: Tensor, losses: dict[str, Tensor], *, share: float
    ) -> None:
        discriminator = self.players.discriminator
        images = x.detach().requires_grad_()
        # The penalty is differentiated twice, where 16 bits would overflow or lose it.
        real = discriminator(images, own)
        with self.autocast():
            fake = discriminator(output, target).float()
        adversarial, penalty = discriminator_loss(real, fake), gradient_penalty(real, images)
        self.scalers[0].scale(share * (adversarial + self.options.r1 * penalty)).backward()
        _add(losses, share, discriminator=adversarial, penalty=penalty, real=real.mean(), fake=fake.mean())

    def _persuade(
        self, x: Tensor, output: Tensor | None, target: Tensor, losses: dict[str, Tensor], *, share: float
    ) -> None:
        with self.autocast():
            output = self.players.decomposer(x, target) if output is None else output
            loss = generator_loss(self.players.discriminator(output, target).float())
        self.scalers[1].scale(share * loss).backward()
        _add(losses, share, generator=loss)

    def _update(self, player: int) -> None:
        optimizer, scaler = self.optimizers[player], self.scalers[player]
        learnt = list(self.players.decomposer.smoother.parameters()) if player == 1 else []
        if learnt:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(learnt, self.options.smoother_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def look(self) -> None:
        for index, losses in enumerate(self.unseen):
            numbers = dict(zip(losses, torch.stack(list(losses.values())).double().tolist(), strict=True))
            if not all(map(math.isfinite, numbers.values())):
                at = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
                step = self.history.steps - len(self.unseen) + index
                raise RuntimeError(
                    f"train: the losses must stay finite, got {at} at step {step}; {self.last_good()}; lower the "
                    "learning rate"
                )
            for name, value in numbers.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.latest = {name: f"{numbers[name]:.3f}" for name in ("discriminator", "generator", "penalty")}
        self.unseen.clear()

    def _close_entry(self) -> dict[str, Any]:
        self.look()
        self.take_time()
        means = {name: total / self.summed for name, total in self.sums.items()}
        entry: dict[str, Any] = {"steps": self.history.steps, "seconds": self.history.seconds, **means}
        self.history.entries.append(entry)
        self.sums, self.summed = {}, 0
        return entry

    def line(self, entry: dict[str, Any]) -> str:
        numbers = [
            f"{name.replace('_', ' ')} {value:.4f}" for name, value in entry.items() if name not in {"steps", "seconds"}
        ]
        return f"step {entry['steps']} of {self.total_steps}, {', '.join(numbers)}, {entry['seconds']:.0f} s"


def _members(images: Tensor, labels: Tensor, num_classes: int, options: Options) -> list[Tensor]:
    """Indices of each class's images."""
    if len(images) != len(labels):
        raise ValueError(f"train: images and labels must be as many, got {len(images)} and {len(labels)}")
    members = [(labels == label).nonzero()[:, 0] for label in range(num_classes)]
    empty = [label for label, own in enumerate(members) if len(own) == 0]
    if empty or len(labels) != sum(map(len, members)):
        raise ValueError(
            f"train: labels must be all of 0 to {num_classes - 1}, got {labels.unique().tolist()}, none of {empty}"
        )
    if not 1 <= options.accumulation <= options.batch_size:
        raise ValueError(
            f"train: accumulation must be in 1 to the batch size {options.batch_size}, got {options.accumulation}"
        )
    return members


def _add(losses: dict[str, Tensor], share: float, **values: Tensor) -> None:
    for name, value in values.items():
        losses[name] = losses.get(name, 0.0) + share * value.detach()
