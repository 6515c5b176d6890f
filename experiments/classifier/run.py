"""Train branched classifiers and measure how their branches specialize: the paper's Figures 5 and 6."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import bsfast
from bsfast import analysis
from experiments.classifier import claims, figures
from experiments.classifier.loss import branched_loss, loss_floor, saturated_shares
from experiments.classifier.model import WIDTHS, make_branch
from experiments.classifier.speed import measure_speed
from experiments.common.data import ImageSet
from experiments.common.record import Run
from experiments.common.training import History, Options, branch_responses, normalise, train

_CALIBRATION_BATCHES = 44
_FULL_EPOCHS = 200


@dataclass(frozen=True)
class Setup:
    """What to train.

    Attributes:
        branches: M of the model that all figures but Figure 5, left, are drawn from.
        all_m: Further M, for Figure 5, left.
        widths: Channels of the four stages of a branch.
        clamp: ``"hard"``, ``"one_sided"`` or ``"none"``.
        readout_scale: Factor on the readout's initial values; None is 1 / sqrt(M).
        train_images: Number of training images taken at random; None is all.
        test_images: Number of test images taken at random; None is all.
        speed_repeats: Timed rounds of fused against loop; 0 leaves the measurement out.
        speed_limit: Time in s after which no further round is begun.
        device: ``"cpu"`` or ``"cuda"``.
        checkpoints: Folder of one checkpoint a model; training continues from those it holds.
    """

    branches: int = 16
    all_m: tuple[int, ...] = ()
    widths: tuple[int, ...] = WIDTHS["paper"]
    clamp: str = "hard"
    readout_scale: float | None = 1.0
    train_images: int | None = None
    test_images: int | None = None
    speed_repeats: int = 20
    speed_limit: float = 120.0
    device: str = "cpu"
    checkpoints: Path | None = None

    @property
    def sizes(self) -> list[int]:
        """All M, ascending."""
        return sorted({self.branches, *self.all_m})


@dataclass(frozen=True)
class Trained:
    """One model after its training: branch outputs on the test set before (main model only) and after, the course."""

    initial: Tensor | None
    outputs: Tensor
    history: History


def run(record: Run, dataset: ImageSet, setup: Setup, options: Options) -> None:
    """Train every model, then record figures, claims, metrics and speed.

    Args:
        record: Gets the results.
        dataset: 32 x 32 images.
        setup: What to train.
        options: How to train; a budget holds for the training of all models together, in proportion to M.

    Raises:
        ValueError: If more images are asked for than there are.
    """
    train_order = _choose("train_images", setup.train_images, len(dataset.train_images), dataset.name, options.seed)
    test_order = _choose("test_images", setup.test_images, len(dataset.test_images), dataset.name, options.seed)
    images, labels = dataset.train_images[train_order], dataset.train_labels[train_order]
    everything = len(train_order) == len(dataset.train_images)
    dataset = replace(dataset, test_images=dataset.test_images[test_order], test_labels=dataset.test_labels[test_order])
    options = replace(options, flip=options.flip and dataset.name != "digits")
    record.metric("data", dataset.note)
    models: dict[int, Trained] = {}
    spent = 0.0
    for size in setup.sizes:
        share = size / sum(other for other in setup.sizes if other >= size)
        budget = None if options.budget is None else max((options.budget - spent) * share, 1e-3)
        models[size] = _train_one(size, images, labels, dataset, setup, replace(options, budget=budget))
        spent += models[size].history.seconds[-1] if models[size].history.seconds else 0.0
        _record_model(record, size, models[size], dataset)
    scale = _scale_note(dataset, len(images), everything, setup, models[setup.branches].history)
    _record_results(record, models, dataset, setup, scale)
    if setup.speed_repeats:
        loss = functools.partial(branched_loss, clamp=setup.clamp)
        branches = _make_branches(setup.branches, setup, len(dataset.classes), options.seed)
        table = measure_speed(
            branches,
            loss,
            batch_size=options.batch_size,
            num_classes=len(dataset.classes),
            repeats=setup.speed_repeats,
            limit=setup.speed_limit,
            device=setup.device,
        )
        record.metric("speed", table | {"what": f"{table['what']}, widths {_joined(setup.widths)}"})


def _choose(argument: str, wanted: int | None, available: int, name: str, seed: int) -> Tensor:
    wanted = available if wanted is None else wanted
    if not 1 <= wanted <= available:
        raise ValueError(f"run: {argument} must be in 1 to {available} for {name}, got {wanted}")
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]


def _make_branches(size: int, setup: Setup, num_classes: int, seed: int) -> list[nn.Module]:
    scale = 1 / math.sqrt(size) if setup.readout_scale is None else setup.readout_scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        branches = [make_branch(setup.widths, num_classes) for _ in range(size)]
    with torch.no_grad():
        for branch in branches:
            branch.linear.weight.mul_(scale)
            branch.linear.bias.mul_(scale)
    return branches


def _train_one(size: int, images: Tensor, labels: Tensor, dataset: ImageSet, setup: Setup, options: Options) -> Trained:
    net = bsfast.fuse(_make_branches(size, setup, len(dataset.classes), options.seed)).to(setup.device)
    initial = None
    if size == setup.branches:
        initial = branch_responses(_calibrated(net, images, options.batch_size), dataset.test_images)
    checkpoint = None if setup.checkpoints is None else setup.checkpoints / f"classifier-m{size}.pt"
    loss = functools.partial(branched_loss, clamp=setup.clamp)
    history = train(net, loss, images, labels, options=options, checkpoint=checkpoint, name=f"M={size}")
    return Trained(initial, branch_responses(net, dataset.test_images), history)


def _calibrated(net: nn.Module, images: Tensor, batch_size: int) -> nn.Module:
    """Copy a new network and run it in train mode until its batch-norm statistics are those of the data.

    The weight of the initial statistics after 44 batches is 0.9**44 < 1 %.
    """
    net = copy.deepcopy(net).train()
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(_CALIBRATION_BATCHES):
            chosen = torch.randint(len(images), (min(batch_size, len(images)),), generator=generator)
            net(normalise(images[chosen].to(device)))
    return net


def _record_model(record: Run, size: int, model: Trained, dataset: ImageSet) -> None:
    f = model.outputs.sum(0)
    active = int(analysis.active_branches(model.outputs).sum())
    centred = int(analysis.active_branches(model.outputs, centred=True).sum())
    saturated, fitted = saturated_shares(f)
    floor = loss_floor(len(dataset.classes))
    numbers = {
        "test_accuracy": (f.argmax(1) == dataset.test_labels).float().mean().item(),
        "test_loss_above_floor_nats": branched_loss(f, dataset.test_labels).item() - floor,
        "training_loss_above_floor_nats": model.history.loss[-1] - floor if model.history.loss else None,
        "active_branches": active,
        "active_branches_centred": centred,
        "saturated_logits": saturated,
        "saturated_samples": fitted,
        "steps": model.history.steps,
        "ended_by": model.history.ended_by,
        "training_seconds": model.history.seconds[-1] if model.history.seconds else 0.0,
    }
    if model.initial is not None:
        numbers["saturated_logits_initial"] = saturated_shares(model.initial.sum(0))[0]
    for name, value in numbers.items():
        record.metric(f"m{size}_{name}", value)
    record.metric(f"m{size}_norms", analysis.response_matrix(model.outputs).norm(dim=1))
    record.metric(f"m{size}_history", asdict(model.history))


def _record_results(record: Run, models: dict[int, Trained], dataset: ImageSet, setup: Setup, note: str) -> None:
    counts = {}
    for size, model in models.items():
        active = int(analysis.active_branches(model.outputs).sum())
        counts[size] = (active, size - active)
    main = models[setup.branches]
    labels, classes = dataset.test_labels, dataset.classes
    if len(models) > 1:
        record.figure(
            "fig5-left",
            figures.counts_figure(counts),
            "Figure 5, left: active and silent branches against M",
            f"A branch is active if its response norm on the test set is at least 10 % of the largest. {note}",
        )
    record.figure(
        "fig5-middle",
        figures.covariances_figure(main.initial, main.outputs),
        f"Figure 5, middle: covariance of the {setup.branches} branches on the test set",
        "F Fᵀ per test image, each panel on its own colour scale. Before training, batch-norm statistics were set by "
        f"{_CALIBRATION_BATCHES} batches. {note}",
    )
    record.figure(
        "fig6",
        figures.outputs_figure(main.outputs, labels, classes),
        "Figure 6: what every branch says before summation",
        f"One panel a branch: {len(labels):,} test images ordered by class against {len(classes)} logits, one shared "
        f"colour scale. {note}",
    )
    record.figure(
        "fig6-summary",
        figures.summary_figure(main.outputs, labels, classes),
        "Figure 6 in brief: mean logits of every branch for each true class",
        f"A branch that serves one class has one strong column. {note}",
    )
    record.figure(
        "training",
        figures.training_figure(
            {size: model.history for size, model in models.items() if model.history.loss}, loss_floor(len(classes))
        ),
        "Training",
        f"Augmented images, running mean over each epoch; the loss cannot fall below {loss_floor(len(classes)):.4f} "
        f"nats because its targets are soft. {note}",
    )
    reasons = {size: claims.not_learnt(model.outputs, labels) for size, model in models.items()}
    every = "; ".join(filter(None, reasons.values())) or None
    own = reasons[setup.branches]
    strength, silence, sum_classifies = claims.judge_outputs(main.outputs, labels)
    for claim in [
        *(claims.withhold(claim, every) for claim in claims.judge_counts(counts)),
        claims.withhold(claims.judge_covariance(main.initial, main.outputs), own),
        claims.withhold(strength, own),
        claims.withhold(silence, own),
        sum_classifies,
    ]:
        record.claim(*claim)


def _scale_note(dataset: ImageSet, train_images: int, everything: bool, setup: Setup, history: History) -> str:
    full = (
        dataset.name == "CIFAR-10"
        and everything
        and setup.widths in {WIDTHS["paper"], WIDTHS["scaled"]}
        and len(history.loss) >= _FULL_EPOCHS
    )
    clamp = "hard clamp" if setup.clamp == "hard" else f"clamp {setup.clamp} (the paper's: hard)"
    return (
        f"{'Full scale' if full else 'Scaled down'}: widths {_joined(setup.widths)}, {train_images:,} training images, "
        f"{history.steps:,} steps, {clamp}. Data: {dataset.note}."
    )


def _joined(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
