"""The training loop of the two players, with checkpoints and a resume that changes nothing.

Every random number is a function of the seed and the step, so a training that was killed and continued takes the very
steps of one that was not.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.class_transfer.augment import augment, to_signal
from experiments.class_transfer.average import update_average
from experiments.class_transfer.decomposer import Decomposer
from experiments.class_transfer.loss import discriminator_loss, generator_loss, gradient_penalty
from experiments.common.checkpoint import load_checkpoint, save_checkpoint
from experiments.common.interrupt import Stopped, stop_request
from experiments.common.streams import stream

_BATCH = 1  # purpose of a stream of random numbers
# The host looks at the losses this often: on an accelerator each look is a wait for all work under way.
_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 20}
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


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
    run.restore()
    with (
        stop_request() as asked,
        tqdm(total=options.steps, initial=run.history.steps, desc=name, disable=None) as bar,
    ):
        for entry in run.advance():
            if entry is not None:
                if observe is not None:
                    entry.update(observe(run.history.steps))
                bar.write(f"{name}: {_line(entry, options.steps)}")
                if log is not None:
                    log(entry)
            run.save(force=entry is not None or bool(run.history.ended_by) or asked())
            bar.set_postfix(run.latest, refresh=False)
            bar.update(run.history.steps - bar.n)
            if asked():
                raise Stopped(f"{name} stopped at step {run.history.steps} of {options.steps}")
    return run.history


class _Training:
    """The state of a training and how to save, restore and advance it."""

    def __init__(
        self,
        players: Players,
        images: Tensor,
        labels: Tensor,
        options: Options,
        checkpoint: Path | None,
        identity: dict[str, Any],
    ) -> None:
        self.players, self.images, self.options, self.checkpoint = players, images, options, checkpoint
        self.identity = full_identity(identity, options, len(images))
        self.members = _members(images, labels, players.decomposer.num_classes, options)
        self.device = next(players.decomposer.parameters()).device.type
        self.optimizers = [
            torch.optim.Adam(
                net.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, foreach=True
            )
            for net in (players.discriminator, players.decomposer)
        ]
        self.scalers = [torch.amp.GradScaler(self.device, enabled=options.precision == "fp16") for _ in range(2)]
        self.history = History()
        self.sums: dict[str, float] = {}  # of the losses since the last entry
        self.summed = 0
        self.unseen: list[dict[str, Tensor]] = []
        self.latest: dict[str, str] = {}
        self.saved_step: int | None = None
        self.last_save = time.perf_counter()
        self.started = time.perf_counter()

    def advance(self) -> Iterator[dict[str, Any] | None]:
        """Take the remaining steps; after each, yield an entry of the history if one is due, else None."""
        history, options = self.history, self.options
        while not history.ended_by:
            history.seconds = time.perf_counter() - self.started
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
            if due or len(self.unseen) >= _STEPS_BETWEEN_LOOKS[self.device]:
                self._look()
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
            with torch.set_grad_enabled(keep), self._autocast():
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
        with self._autocast():
            fake = discriminator(output, target).float()
        adversarial, penalty = discriminator_loss(real, fake), gradient_penalty(real, images)
        self.scalers[0].scale(share * (adversarial + self.options.r1 * penalty)).backward()
        _add(losses, share, discriminator=adversarial, penalty=penalty, real=real.mean(), fake=fake.mean())

    def _persuade(
        self, x: Tensor, output: Tensor | None, target: Tensor, losses: dict[str, Tensor], *, share: float
    ) -> None:
        with self._autocast():
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

    def _autocast(self) -> AbstractContextManager[Any]:
        half = _HALF.get(self.options.precision)
        return torch.autocast(self.device, dtype=half, enabled=half is not None)

    def _look(self) -> None:
        """Add the losses since the last look to the sums, and refuse those that are not finite."""
        for index, losses in enumerate(self.unseen):
            numbers = dict(zip(losses, torch.stack(list(losses.values())).double().tolist(), strict=True))
            if not all(map(math.isfinite, numbers.values())):
                at = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
                step = self.history.steps - len(self.unseen) + index
                raise RuntimeError(
                    f"train: the losses must stay finite, got {at} at step {step}; {self._last_good()}; lower the "
                    "learning rate"
                )
            for name, value in numbers.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.latest = {name: f"{numbers[name]:.3f}" for name in ("discriminator", "generator", "penalty")}
        self.unseen.clear()

    def _close_entry(self) -> dict[str, Any]:
        self._look()
        self.history.seconds = time.perf_counter() - self.started
        means = {name: total / self.summed for name, total in self.sums.items()}
        entry: dict[str, Any] = {"steps": self.history.steps, "seconds": self.history.seconds, **means}
        self.history.entries.append(entry)
        self.sums, self.summed = {}, 0
        return entry

    def _last_good(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good state, of step {self.saved_step}, is in {self.checkpoint}"

    def save(self, *, force: bool) -> None:
        """Write the checkpoint if it is time to, or at once."""
        due = time.perf_counter() - self.last_save >= self.options.save_seconds
        if self.checkpoint is None or not (force or due):
            return
        self._look()
        nets = {name: net.state_dict() for name, net in self.players._asdict().items()}
        tensors = [tensor for net in nets.values() for tensor in net.values()]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise RuntimeError(
                f"train: the parameters must stay finite, and are not after step {self.history.steps}; "
                f"{self._last_good()}; lower the learning rate"
            )
        state = {
            "nets": nets,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scalers": [scaler.state_dict() for scaler in self.scalers],
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
        for name, net in self.players._asdict().items():
            net.load_state_dict(state["nets"][name])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        for scaler, own in zip(self.scalers, state["scalers"], strict=True):
            if own:
                scaler.load_state_dict(own)
        self.history = History(**state["history"])
        self.sums, self.summed = state["sums"], state["summed"]
        self.saved_step = self.history.steps
        self.started = time.perf_counter() - self.history.seconds


def full_identity(identity: dict[str, Any], options: Options, images: int) -> dict[str, Any]:
    """What a checkpoint of a training belongs to: whose it is, its options, and the number of its images."""
    own = {**asdict(options), "betas": list(options.betas), "save_seconds": None, "images": images}
    return identity | {"training": own}


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


def _line(entry: dict[str, Any], steps: int) -> str:
    numbers: Sequence[str] = [
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in entry.items() if name not in {"steps", "seconds"}
    ]
    return f"step {entry['steps']} of {steps}, {', '.join(numbers)}, {entry['seconds']:.0f} s"
