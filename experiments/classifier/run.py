"""Train branched classifiers and measure how their branches specialize: Figures 5 to 8, 16 and 17, and section 8."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bsfast import analysis
from experiments.classifier import claims, measure
from experiments.classifier.claims import Case, Trained
from experiments.classifier.draw import draw
from experiments.classifier.loss import branched_loss, loss_floor, saturated_shares
from experiments.classifier.population import Model, Population, make_branches
from experiments.classifier.setup import Setup
from experiments.classifier.speed import measure_speed
from experiments.classifier.training import History, Options, branch_responses, train
from experiments.common.augment import normalise
from experiments.common.data import ImageSet, random_subset
from experiments.common.record import Run
from experiments.common.resumable import CHECKPOINT
from experiments.common.tensorboard import tensorboard_log

_CALIBRATION_BATCHES = 20
_WATCHED_IMAGES = 2000
_EQUILIBRIUM_IMAGES = 500
_GALLERY = ("horse", "deer", "bird")
_GALLERY_LEAST = 3
_TRAINING = ("epochs", "batch_size", "lr", "weight_decay", "time_limit", "seed", "precision", "save_seconds")


def run(record: Run, dataset: ImageSet, setup: Setup) -> None:
    """Train all models in one pass over the data, then record figures, claims, metrics and speed.

    Training continues from ``checkpoint.pt`` in the run's folder if that is there.

    Args:
        record: Gets the results.
        dataset: 32 x 32 images.
        setup: What to train.

    Raises:
        ValueError: If more images are asked for than there are, or the checkpoint is not this run's.
        RuntimeError: If the loss stops being finite, or a checkpoint cannot be written.
        Stopped: After Ctrl-C or SIGTERM, with a checkpoint written.
    """
    dataset = random_subset(dataset, setup)
    record.metric("data", dataset.note)
    population = Population(setup, len(dataset.classes))
    initial = branch_responses(initial_population(setup, dataset).net, dataset.test_images)
    history = _train(record, population, dataset, setup)
    outputs = branch_responses(population.net, dataset.test_images)
    trained = {
        model: Trained(before, after)
        for model, before, after in zip(
            population.models, population.split(initial), population.split(outputs), strict=True
        )
    }
    for index, model in enumerate(population.models):
        _record_model(record, model, trained[model], dataset, history, index)
    record.metric("history", history.epochs)
    record.metric("steps", history.steps)
    record.metric("ended_by", history.ended_by)
    record.metric("training_seconds", history.seconds)
    cases = _cases(population, trained, dataset, setup)
    record.metric("equilibrium", cases[0].equilibrium)
    draw(record, cases, dataset, setup, population.models, history)
    claims.judge(record, cases)
    if setup.speed_repeats:
        _record_speed(record, setup, len(dataset.classes))


def _train(record: Run, population: Population, dataset: ImageSet, setup: Setup) -> History:
    options = Options(flip=dataset.name != "digits", **{name: getattr(setup, name) for name in _TRAINING})
    record.metric("training", asdict(options))
    watched, watched_labels = dataset.test_images[:_WATCHED_IMAGES], dataset.test_labels[:_WATCHED_IMAGES]

    def evaluate() -> dict[str, list[float]]:
        models = population.split(branch_responses(population.net, watched))
        return {"test_accuracy": [claims.accuracy(own.sum(0), watched_labels) for own in models]}

    names = [model.name for model in population.models]
    return train(
        population.net,
        population.score,
        dataset.train_images.to(setup.device),
        dataset.train_labels.to(setup.device),
        options=options,
        checkpoint=record.folder / CHECKPOINT,
        identity=identity(population.models, dataset, setup),
        evaluate=evaluate,
        log=tensorboard_log(record.folder, names) if setup.tensorboard else None,
        name=f"classifier {' '.join(names)}",
    )


def identity(models: Sequence[Model], dataset: ImageSet, setup: Setup) -> dict[str, Any]:
    """Tell what a checkpoint belongs to; a checkpoint of anything else is refused.

    Args:
        models: The classifiers.
        dataset: The images that they are trained on.
        setup: How.

    Returns:
        As :func:`experiments.common.checkpoint.load_checkpoint` takes it.
    """
    return {
        "experiment": "classifier",
        "models": [model.name for model in models],
        "widths": list(setup.widths),
        "clamp": setup.clamp,
        "readout_scale": setup.readout_scale,
        "data": f"{dataset.name}, {dataset.training_crc()}",
    }


def initial_population(setup: Setup, dataset: ImageSet) -> Population:
    """Make the models as they are before training, with batch-norm statistics that are the mean over some batches.

    Those of a new network, mean 0 and variance 1, would say nothing.

    Args:
        setup: What to train.
        dataset: The images that it is trained on.

    Returns:
        The models, in training mode.
    """
    population = Population(setup, len(dataset.classes), batchnorm_momentum=None)
    net = population.net.train()
    generator = torch.Generator().manual_seed(setup.seed)
    images, count = dataset.train_images, min(setup.batch_size, len(dataset.train_images))
    with torch.no_grad():
        for _ in range(_CALIBRATION_BATCHES):
            chosen = torch.randint(len(images), (count,), generator=generator)
            net.branch_outputs(normalise(images[chosen].to(setup.device)))
    return population


def _cases(population: Population, trained: dict[Model, Trained], dataset: ImageSet, setup: Setup) -> list[Case]:
    few = slice(min(_EQUILIBRIUM_IMAGES, len(dataset.train_images)))
    cases = []
    for seed in setup.init_seeds:
        main = Model(setup.branches, seed)
        own = [branch.cpu() for branch in population.branches_of(main)]
        cases.append(
            Case(
                models={model.branches: result for model, result in trained.items() if model.seed == seed},
                main=setup.branches,
                labels=dataset.test_labels,
                gallery=_gallery(dataset),
                equilibrium=measure.equilibrium(
                    own, dataset.train_images[few], dataset.train_labels[few], clamp=setup.clamp
                ),
            )
        )
    return cases


def _gallery(dataset: ImageSet) -> list[int]:
    """Classes of Figure 8 among those with some test images; the first three where those of the paper are not there."""
    usable = [label for label in range(len(dataset.classes)) if (dataset.test_labels == label).sum() >= _GALLERY_LEAST]
    return [label for name in _GALLERY for label in usable if dataset.classes[label] == name] or usable[:3]


def _record_model(record: Run, model: Model, trained: Trained, dataset: ImageSet, history: History, index: int) -> None:
    f = trained.outputs.sum(0)
    floor = loss_floor(len(dataset.classes))
    saturated, all_saturated = saturated_shares(f)
    cov = analysis.covariance(analysis.response_matrix(trained.outputs))
    first = analysis.covariance(analysis.response_matrix(trained.initial))
    losses = history.course("loss", index)
    numbers = {
        "test_accuracy": claims.accuracy(f, dataset.test_labels),
        "test_loss_above_floor_nats": branched_loss(f, dataset.test_labels).item() - floor,
        "training_loss_above_floor_nats": losses[-1] - floor if losses else None,
        "active_branches": int(analysis.active_branches(trained.outputs).sum()),
        "active_branches_centred": int(analysis.active_branches(trained.outputs, centred=True).sum()),
        "offdiag_ratio_initial": analysis.offdiag_ratio(first),
        "offdiag_ratio": analysis.offdiag_ratio(cov),
        "offdiag_cosine_of_active": analysis.offdiag_cosine(cov, analysis.active_branches(trained.outputs)),
        "saturated_logits": saturated,
        "saturated_samples": all_saturated,
        "saturated_logits_initial": saturated_shares(trained.initial.sum(0))[0],
        "norms": cov.diagonal().sqrt(),
    }
    record.metric(model.name, numbers)


def _record_speed(record: Run, setup: Setup, num_classes: int) -> None:
    table = measure_speed(
        make_branches(Model(setup.branches, setup.seed), setup, num_classes),
        functools.partial(branched_loss, clamp=setup.clamp),
        batch_size=setup.batch_size,
        num_classes=num_classes,
        repeats=setup.speed_repeats,
        limit=setup.speed_limit,
        device=setup.device,
    )
    widths = ", ".join(map(str, setup.widths))
    record.metric("speed", table | {"what": f"{table['what']}, widths {widths}"})
