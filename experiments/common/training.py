"""The training loop for image classifiers: augmentation on tensors, SGD, a cosine schedule, checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


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
        budget: Wall-clock limit in s, or None; the schedule shrinks so that it ends at the limit.
        flip: Whether images are flipped left to right at random.
        pad: Pixels of black border for random crops.
        seed: Seed of the batches' order and the augmentation.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 2 / 30
    budget: float | None = None
    flip: bool = True
    pad: int = 4
    seed: int = 0


@dataclass
class History:
    """What happened, one entry an epoch.

    Attributes:
        loss: Mean training loss, in nats.
        accuracy: Share of training images classified right while training, augmented.
        lr: Learning rate at the epoch's end.
        seconds: Wall-clock time since the start, in s.
        steps: Optimiser steps taken in all.
        ended_by: ``"epochs"`` or ``"budget"``.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    ended_by: str = "epochs"


def train(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    options: Options,
    checkpoint: Path | None = None,
    name: str = "training",
) -> History:
    """Train a classifier in place.

    Args:
        net: Maps normalised images ``(N, 3, H, W)`` to logits ``(N, C)``.
        loss: Maps logits ``(N, C)`` and labels ``(N,)`` to the mean loss, a scalar.
        images: Pixels, uint8, shape ``(N, 3, H, W)``.
        labels: Class indices, int64, shape ``(N,)``.
        options: How to train.
        checkpoint: File written after each epoch; if it exists, training continues from it.
        name: Label of the progress bar.

    Returns:
        Loss and accuracy of each epoch.

    Raises:
        ValueError: If images and labels differ in number or there are none.
        RuntimeError: If the loss stops being finite; names the step.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"train: images and labels must be as many and at least 1, got {len(images)} and {len(labels)}"
        )
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    history = History()
    if checkpoint is not None and checkpoint.exists():
        history = load_checkpoint(checkpoint, net, optimizer, generator)
    batch_size = min(options.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    before = history.seconds[-1] if history.seconds else 0.0
    started = time.perf_counter() - before
    net.train()
    with tqdm(total=options.epochs * steps_per_epoch, initial=history.steps, desc=name, disable=None) as bar:
        for _ in range(len(history.loss), options.epochs):
            order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * batch_size]
            losses, hits, seen = 0.0, 0, 0
            for indices in order.split(batch_size):
                elapsed = time.perf_counter() - started
                progress = (history.steps + 0.5) / (options.epochs * steps_per_epoch)
                if options.budget is not None:
                    progress = max(progress, elapsed / options.budget)
                if progress >= 1:
                    history.ended_by = "budget"
                    break
                rate = options.lr * schedule(progress, warmup=options.warmup)
                batch = augment(images[indices], generator=generator, pad=options.pad, flip=options.flip)
                value, right = _step(net, loss, optimizer, batch, labels[indices], rate)
                if not math.isfinite(value):
                    raise RuntimeError(
                        f"train: the loss must stay finite, got {value} at step {history.steps} (epoch "
                        f"{history.steps // steps_per_epoch}, learning rate {rate:.3g}); lower the learning rate"
                    )
                losses, hits, seen = losses + value * len(indices), hits + right, seen + len(indices)
                history.steps += 1
                bar.set_postfix(loss=f"{losses / seen:.4f}", accuracy=f"{hits / seen:.1%}", refresh=False)
                bar.update()
            if seen:
                history.loss.append(losses / seen)
                history.accuracy.append(hits / seen)
                history.lr.append(rate)
                history.seconds.append(time.perf_counter() - started)
                bar.write(
                    f"{name}: epoch {len(history.loss)} of {options.epochs}, loss {losses / seen:.4f}, "
                    f"accuracy {hits / seen:.1%}, {history.seconds[-1]:.0f} s"
                )
                if checkpoint is not None:
                    save_checkpoint(checkpoint, net, optimizer, generator, history)
            if history.ended_by == "budget":
                break
    return history


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


def augment(images: Tensor, *, generator: torch.Generator, pad: int, flip: bool) -> Tensor:
    """Shift each image by up to ``pad`` pixels over a black border and flip half of them left to right.

    Equivalent to ``RandomCrop(H, padding=pad)`` and ``RandomHorizontalFlip()`` of torchvision on each image.

    Args:
        images: Shape ``(N, C, H, W)``, any dtype.
        generator: Source of the shifts and flips.
        pad: Largest shift, in pixels.
        flip: Whether to flip.

    Returns:
        Shape and dtype as ``images``.
    """
    count, channels, height, width = images.shape
    padded = nn.functional.pad(images, (pad, pad, pad, pad))
    shifts = torch.randint(2 * pad + 1, (2, count, 1), generator=generator)
    rows = shifts[0] + torch.arange(height)
    columns = shifts[1] + torch.arange(width)
    if flip:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    samples = torch.arange(count)[:, None, None, None]
    return padded[samples, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 with about zero mean and unit deviation, CIFAR-10's constants for every set."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


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
        parts = [net.branch_outputs(normalise(batch.to(device))).cpu() for batch in images.split(batch_size)]
    net.train(was_training)
    return torch.cat(parts, dim=1)


def save_checkpoint(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, history: History
) -> None:
    """Write all that training needs to continue, in one step: readers see the old file or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "history": asdict(history),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> History:
    """Restore what :func:`save_checkpoint` wrote, into the objects given; only tensors and plain values are unpickled.

    Args:
        path: The file.
        net: Gets the parameters and buffers.
        optimizer: Gets its state.
        generator: Gets its state.

    Returns:
        The history so far.
    """
    state = torch.load(path, weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return History(**state["history"] | {"ended_by": "epochs"})


def _step(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    rate: float,
) -> tuple[float, int]:
    device = next(net.parameters()).device
    labels = labels.to(device)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    logits = net(normalise(images.to(device)))
    value = loss(logits, labels)
    value.backward()
    optimizer.step()
    return value.item(), int((logits.detach().argmax(1) == labels).sum())
