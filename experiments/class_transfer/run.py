"""Train a class transfer and record what it came to: checkpoint, samples, exactness of the decomposition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.class_transfer import draw, eyes, measure
from experiments.class_transfer.augment import to_signal
from experiments.class_transfer.classifier import accuracy, train_classifier
from experiments.class_transfer.data import CAT, load_photographs
from experiments.class_transfer.decomposer import Decomposer, Decomposition, decompose_all
from experiments.class_transfer.figures import draw_figures
from experiments.class_transfer.judge_layers import judge_layers
from experiments.class_transfer.model import make_branches, make_decomposer, make_players
from experiments.class_transfer.pictures import amplified, shown_images, to_pixels
from experiments.class_transfer.setup import Setup
from experiments.class_transfer.sliders import SLIDERS, write_sliders
from experiments.class_transfer.speed import measure_speed, speedups
from experiments.class_transfer.training import History, Options, Players, train
from experiments.class_transfer.warm_start import warm_start
from experiments.common.atomic import write_atomically
from experiments.common.data import ImageSet
from experiments.common.record import Run
from experiments.common.resumable import CHECKPOINT
from experiments.common.synthetic.sets import SETS
from experiments.common.tensorboard import tensorboard_log
from experiments.common.training import full_identity

_EXACT = 1e-5
_SMOOTH = 0.5
_ROWS = 8  # of a sheet of samples
_MEASURED_IMAGES = 200
_FAITHFUL = 20.0  # dB
_CLASS_ACCURACY = 0.8
_TRANSFERRED = 1.5  # times chance
_TRAINING = (
    *("steps", "batch_size", "accumulation", "lr", "weight_decay", "r1", "average_decay", "time_limit", "seed"),
    *("precision", "save_seconds", "report_steps"),
)


def run(record: Run, dataset: ImageSet, setup: Setup) -> None:
    """Train both players, then record samples, metrics and claims.

    Training continues from ``checkpoint.pt`` in the run's folder if that is there. Sheets of samples go to the folder
    ``samples``, one every ``report_steps``.

    Args:
        record: Gets the results.
        dataset: Images of the setup's size.
        setup: What to train.

    Raises:
        ValueError: If the checkpoint is not this run's.
        RuntimeError: If a loss stops being finite, or a checkpoint cannot be written.
        Stopped: After Ctrl-C or SIGTERM, with a checkpoint written.
    """
    photographs = load_photographs(setup)
    record.metric("data", dataset.note)
    record.metric("classes", dataset.classes)
    players = make_players(setup, len(dataset.classes))
    record.metric(
        "parameters",
        {
            "branch": _count(players.decomposer.branches) // setup.branches,
            "smoother": _count(players.decomposer.smoother),
            "discriminator": _count(players.discriminator),
        },
    )
    if setup.warm_start and not (record.folder / CHECKPOINT).exists():
        _warm_start(players, dataset, setup)
    history = _train(record, players, dataset, setup)
    record.metric("history", history.entries)
    record.metric("steps", history.steps)
    record.metric("ended_by", history.ended_by)
    record.metric("training_seconds", history.seconds)
    _draw(record, players.average, dataset, setup, history)
    write_sliders(record.folder / SLIDERS, players.average, dataset, made_by(setup, dataset, history.steps))
    record.metric("page", {"file": SLIDERS, "title": "One slider per branch"})
    _judge_split(record, players.average, dataset, setup)
    _judge_speed(record, dataset, setup)
    _judge_transfer(record, players.average, dataset, setup)
    if setup.data in SETS and setup.score_images:
        _judge_layers(record, players.average, dataset, setup)
    if setup.data == "SynthAnimals" and CAT in dataset.classes and setup.score_images:
        eyes.judge_eyes(
            record,
            players.average,
            classes=dataset.classes,
            image_size=setup.image_size,
            count=setup.score_images,
            seed=setup.seed,
            made=made_by(setup, dataset, history.steps),
            photographs=photographs,
        )


def _warm_start(players: Players, dataset: ImageSet, setup: Setup) -> None:
    loss = warm_start(
        players.decomposer.smoother,
        dataset.train_images,
        steps=setup.warm_start,
        sigma=_sigma(setup),
        batch_size=setup.batch_size,
        seed=setup.seed,
    )
    players.average.smoother.load_state_dict(players.decomposer.smoother.state_dict())
    print(f"The smoother imitates the Gaussian to a mean square of {loss:.4g}.")


def _train(record: Run, players: Players, dataset: ImageSet, setup: Setup) -> History:
    options = Options(**{name: getattr(setup, name) for name in _TRAINING})
    identity = _identity(dataset, setup)
    record.metric("identity", full_identity(identity, options, len(dataset.train_images)))
    x, labels = shown_images(dataset, _ROWS)
    folder = record.folder / "samples"
    folder.mkdir(exist_ok=True)

    def observe(step: int) -> dict[str, float]:
        parts = decompose_all(players.average, x, labels)
        images = _columns(players.average, x, labels, parts)
        write_atomically(folder / f"step-{step:07d}.png", draw.sheet_png(images))
        return {"roughness": measure.roughness(parts.R, x)}

    return train(
        players,
        dataset.train_images.to(setup.device),
        dataset.train_labels,
        options=options,
        checkpoint=record.folder / CHECKPOINT,
        identity=identity,
        observe=observe,
        log=tensorboard_log(record.folder, ["class-transfer"]) if setup.tensorboard else None,
        name=f"class transfer, R {setup.smoother}",
    )


def _identity(dataset: ImageSet, setup: Setup) -> dict[str, Any]:
    """What a checkpoint belongs to; a checkpoint of anything else is refused."""
    names = ("image_size", "branches", "smoother", "inputs", "sigma", "velocity", "warm_start", "output_scale")
    widths = {name: list(getattr(setup, name) or ()) for name in ("widths", "discriminator_widths")}
    return {
        "experiment": "class-transfer",
        "data": f"{dataset.name}, {', '.join(dataset.classes)}, {dataset.training_crc()}",
        **{name: getattr(setup, name) for name in names},
        **widths,
    }


def _columns(decomposer: Decomposer, x: Tensor, labels: Tensor, parts: Decomposition) -> np.ndarray:
    """Rows of x, R, f to every class, and what each branch adds to f of the image's own class, as pixels."""
    classes = range(decomposer.num_classes)
    transfers = [decompose_all(decomposer, x, torch.full_like(labels, label)).f for label in classes]
    return to_pixels(torch.stack([x, parts.R, *transfers, *amplified(parts.v)], dim=1))


def made_by(setup: Setup, dataset: ImageSet, steps: int) -> str:
    """Say for the figures how the generator was made."""
    return (
        f"The averaged generator after {steps} steps; budget {setup.budget}, "
        f"{setup.image_size} x {setup.image_size} pixels, R: {setup.smoother}, branches see the {setup.inputs}. "
        f"Data: {dataset.note}."
    )


def _draw(record: Run, decomposer: Decomposer, dataset: ImageSet, setup: Setup, history: History) -> None:
    draw_figures(record, decomposer, dataset, made_by(setup, dataset, history.steps))
    entries = [entry for entry in history.entries if "roughness" in entry]
    if entries:
        losses = {name: [entry[name] for entry in entries] for name in ("discriminator", "generator", "penalty")}
        data = {
            "steps": [entry["steps"] for entry in entries],
            "losses": losses,
            "roughness": [entry["roughness"] for entry in entries],
        }
        note = "Means since the point before; the penalty is R1. Roughness: energy of R beyond a Gaussian of 1 pixel."
        record.figure("training", draw.training, data, "Training", note)


def _judge_split(record: Run, decomposer: Decomposer, dataset: ImageSet, setup: Setup) -> None:
    """Check on test images that the decomposition is exact, and how smooth R is."""
    x, labels = to_signal(dataset.test_images[:_MEASURED_IMAGES]), dataset.test_labels[:_MEASURED_IMAGES]
    parts = decompose_all(decomposer, x, labels)
    with torch.no_grad():
        batches = zip(x.split(64), labels.split(64), strict=True)
        f = torch.cat([decomposer(part.to(setup.device), own.to(setup.device)).cpu() for part, own in batches])
    output, inputs = measure.output_error(parts, f), measure.input_error(parts, x)
    rough = measure.roughness(parts.R, x)
    numbers = {"output_error": output, "input_error": inputs, "roughness": rough, "shares": measure.shares(parts)}
    record.metric("decomposition", numbers)
    said = f"largest difference {output:.2g} on {len(x)} test images"
    record.claim("eq. 15", f"f = R + the sum of all v, to {_EXACT:g}", said, output <= _EXACT)
    said = "R comes without bands" if inputs is None else f"largest difference {inputs:.2g} on {len(x)} test images"
    held = None if inputs is None else inputs <= _EXACT
    record.claim("eq. 16, 17", f"x = R + the sum of all bands, to {_EXACT:g}, after training", said, held)
    said = f"R is not learnt; its share is {rough:.2g}" if setup.smoother != "learnt" else f"share {rough:.2g}"
    claim = f"the learnt R is smooth: its energy beyond a Gaussian of 1 pixel is below {_SMOOTH} of the image's"
    record.claim("Fig. 18 to 20", claim, said, rough < _SMOOTH if setup.smoother == "learnt" else None)


def _judge_speed(record: Run, dataset: ImageSet, setup: Setup) -> None:
    x, labels = shown_images(dataset, setup.batch_size)
    style = torch.nn.functional.one_hot(labels, len(dataset.classes)).to(x)
    with torch.random.fork_rng(devices=[]):
        branches = make_branches(setup, len(dataset.classes))
    table = measure_speed(branches, x.to(setup.device), style.to(setup.device))
    record.metric("speed", table)
    record.metric("fused_speedup", speedups(table))


def _judge_transfer(record: Run, decomposer: Decomposer, dataset: ImageSet, setup: Setup) -> None:
    """Measure on test images what f keeps of the image, and whether it is of the class it should be."""
    classes = len(dataset.classes)
    x, labels = to_signal(dataset.test_images[:_MEASURED_IMAGES]), dataset.test_labels[:_MEASURED_IMAGES]
    outputs = [decompose_all(decomposer, x, torch.full_like(labels, target)) for target in range(classes)]
    f = torch.stack([parts.f for parts in outputs])
    own = f[labels, torch.arange(len(x))]
    sigma = _sigma(setup)
    fidelity = measure.low_pass_psnr(own, x, sigma)
    classifier = train_classifier(
        dataset.train_images,
        dataset.train_labels,
        num_classes=classes,
        steps=setup.classifier_steps,
        seed=setup.seed,
        device=setup.device,
    )
    targets = torch.arange(classes).repeat_interleave(len(x))
    other = targets != labels.repeat(classes)
    numbers = {
        "real": accuracy(classifier, to_signal(dataset.test_images), dataset.test_labels),
        "own class": accuracy(classifier, own, labels),
        "other class": accuracy(classifier, f.flatten(0, 1)[other], targets[other]),
        "R": accuracy(classifier, outputs[0].R, labels),
        "x as another": accuracy(classifier, x.repeat(classes, 1, 1, 1)[other], targets[other]),
    }
    record.metric("fidelity", fidelity)
    record.metric("class_accuracy", numbers)
    said = f"{fidelity:.1f} dB on {len(x)} test images"
    claim = (
        f"f of the image's own class keeps what a Gaussian of {sigma:g} pixels leaves: PSNR at least {_FAITHFUL:g} dB"
    )
    record.claim("Fig. 9", claim, said, fidelity >= _FAITHFUL)
    said = (
        f"{numbers['own class']:.3f} to the image's own class; real test images {numbers['real']:.3f}, R alone "
        f"{numbers['R']:.3f}, chance {1 / classes:.3f}"
    )
    claim = f"a classifier trained on real images only sees f as of its class: own class at least {_CLASS_ACCURACY:g}"
    record.claim("Fig. 9", claim, said, numbers["own class"] >= _CLASS_ACCURACY)
    said = (
        f"{numbers['other class']:.3f} to another class; the images left as they are {numbers['x as another']:.3f}, "
        f"chance {1 / classes:.3f}"
    )
    claim = f"the classifier sees f as of another class where it should be: at least {_TRANSFERRED:g} times chance"
    record.claim("Fig. 9", claim, said, numbers["other class"] >= _TRANSFERRED / classes)


def _judge_layers(record: Run, decomposer: Decomposer, dataset: ImageSet, setup: Setup) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        untrained = make_decomposer(setup, len(dataset.classes)).to(setup.device)
    untrained.smoother.load_state_dict(decomposer.smoother.state_dict())
    judge_layers(
        record,
        decomposer,
        untrained,
        data=setup.data,
        classes=dataset.classes,
        image_size=setup.image_size,
        count=setup.score_images,
        sigma=_sigma(setup),
        seed=setup.seed,
    )


def _sigma(setup: Setup) -> float:
    """Deviation of the Gaussian, in pixels."""
    return setup.image_size / 16 if setup.sigma is None else setup.sigma


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
