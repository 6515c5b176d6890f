"""Record the classifier's figures: data in, drawing functions and notes alongside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bsfast import analysis, plotting
from experiments.classifier import figures, measure
from experiments.classifier.claims import Case, top_count
from experiments.classifier.loss import loss_floor
from experiments.classifier.model import WIDTHS
from experiments.classifier.population import Model
from experiments.classifier.setup import Setup
from experiments.classifier.training import History
from experiments.common.data import ImageSet
from experiments.common.record import Run

_FULL_EPOCHS = 200
_DRAWN_PER_CLASS = 100  # a panel has fewer pixels than the test set has images
_CONFIDENCE_PER_CLASS = 20
_GALLERIES = {8: 0.02, 16: 0.07}  # shares of the class's test images


def draw(
    record: Run, cases: Sequence[Case], dataset: ImageSet, setup: Setup, models: Sequence[Model], history: History
) -> None:
    """Record every figure that the models allow; all but the counts are of the first seed.

    Args:
        record: Gets the figures.
        cases: One a seed.
        dataset: The images that were used.
        setup: What was trained.
        models: In the order of the history's scores.
        history: Course of the training.
    """
    case, note = cases[0], scale_note(dataset, setup, history)
    if len(case.models) > 1:
        _counts(record, cases, note)
    main = case.models[case.main]
    _covariances(record, "figure-5-middle", {"initial": main.initial, "trained": main.outputs}, case.main, note)
    title = f"Figure 6: what every branch says before summation, M={case.main}"
    _outputs(record, "figure-6", case.outputs, dataset, title, note)
    record.figure(
        "figure-6-summary",
        plotting.class_summary_figure,
        {"summary": analysis.class_summary(case.outputs, case.labels), "class_names": dataset.classes},
        "Figure 6 in brief: mean logits of every branch for each true class",
        f"A branch that serves one class has one strong column. {note}",
    )
    _confidence(record, case, dataset, setup.seed, note)
    if case.main > 1 and case.gallery:
        _galleries(record, case, dataset, note)
    if len(case.models) > 1:
        for size, model in sorted(case.models.items()):
            title = f"Figure 17, left: outputs of M={size} branches"
            _outputs(record, f"figure-17-m{size}", model.outputs, dataset, title, note)
        trained = {f"M={size}": model.outputs for size, model in sorted(case.models.items())}
        _covariances(record, "figure-17-covariances", trained, None, note)
    _training(record, dataset, models, history, note)


def scale_note(dataset: ImageSet, setup: Setup, history: History) -> str:
    """Say data, budget and seed of a run in a few words, and whether it is the paper's scale."""
    full = (
        dataset.name == "CIFAR-10"
        and setup.train_images is None
        and setup.widths in {WIDTHS["paper"], WIDTHS["scaled"]}
        and (setup.test_images, setup.clamp, setup.weight_decay, setup.readout_scale) == (None, "hard", 5e-4, 1.0)
        and len(history.epochs) >= _FULL_EPOCHS
        and history.ended_by == "epochs"
    )
    clamp = "hard clamp" if setup.clamp == "hard" else f"clamp {setup.clamp} (the paper's: hard)"
    return (
        f"{'Full scale' if full else 'Scaled down'}: budget {setup.budget}, "
        f"widths {', '.join(map(str, setup.widths))}, "
        f"{len(dataset.train_images):,} training images, {history.steps:,} steps, {clamp}, weight decay "
        f"{setup.weight_decay:g}, readout scale {setup.readout_scale or '1/sqrt(M)'}, "
        f"{setup.precision}, seed {setup.seed}. "
        f"Data: {dataset.note}."
    )


def _counts(record: Run, cases: Sequence[Case], note: str) -> None:
    counts = [case.counts() for case in cases]
    sizes = sorted(counts[0])
    active, silent = ([float(np.mean([own[size][part] for own in counts])) for size in sizes] for part in (0, 1))
    seeds = f"Mean over {len(cases)} initialisations. " if len(cases) > 1 else ""
    record.figure(
        "figure-5-left",
        plotting.active_silent_figure,
        {"num_branches": sizes, "active": active, "silent": silent, "log2": True},
        "Figure 5, left: active and silent branches against M",
        f"A branch is active if its response norm on the test set is at least 10 % of the largest. {seeds}{note}",
    )


def _covariances(record: Run, name: str, outputs: dict[str, Tensor], size: int | None, note: str) -> None:
    cov = {title: analysis.covariance(analysis.response_matrix(own)) for title, own in outputs.items()}
    titles = [f"{title}, off-diagonal ratio {analysis.offdiag_ratio(own):.3f}" for title, own in cov.items()]
    matrices = [own / next(iter(outputs.values())).shape[1] for own in cov.values()]
    title = (
        "Figure 17, right: covariance of the branches for each M"
        if size is None
        else f"Figure 5, middle: covariance of the {size} branches on the test set"
    )
    record.figure(
        name,
        figures.covariances,
        {"matrices": matrices, "titles": titles, "columns": 3 if size is None else 2},
        title,
        "F Fᵀ per test image, each panel on its own colour scale. Before training, batch-norm statistics are those of "
        f"the data. {note}",
    )


def _outputs(record: Run, name: str, outputs: Tensor, dataset: ImageSet, title: str, note: str) -> None:
    shown = measure.sample_of_each_class(dataset.test_labels, _DRAWN_PER_CLASS, seed=0)
    record.figure(
        name,
        plotting.branch_outputs_figure,
        {"outputs": outputs[:, shown], "labels": dataset.test_labels[shown], "class_names": dataset.classes},
        title,
        f"One panel a branch: {len(shown):,} test images ordered by class, at most {_DRAWN_PER_CLASS} of each, against "
        f"{len(dataset.classes)} logits, one shared colour scale. {note}",
    )


def _confidence(record: Run, case: Case, dataset: ImageSet, seed: int, note: str) -> None:
    shown = measure.sample_of_each_class(case.labels, _CONFIDENCE_PER_CLASS, seed)
    kinds = {"logit": "v_k(x)_y", "centred": "v_k(x)_y - mean over the logits", "margin": "v_k(x)_y - largest other"}
    for kind, formula in kinds.items():
        record.figure(
            "figure-7" if kind == "logit" else f"figure-7-{kind}",
            plotting.confidence_figure,
            {
                "confidence": analysis.confidence(case.outputs[:, shown], case.labels[shown], kind=kind),
                "labels": case.labels[shown],
                "class_names": dataset.classes,
                "colour_label": formula,
            },
            f"Figure 7: confidence of every branch in the true class ({kind})",
            f"{formula} for {len(shown)} random test images, at most {_CONFIDENCE_PER_CLASS} of each class; y is the "
            f"true class. {note}",
        )


def _galleries(record: Run, case: Case, dataset: ImageSet, note: str) -> None:
    pair = measure.most_informative(case.outputs, case.labels, case.gallery)
    for number, share in _GALLERIES.items():
        labels = case.gallery if number == 8 else case.gallery[:1]
        images, rows = [], []
        for label in labels:
            count = min(top_count(case.labels, other, share) for other in labels)
            ranking = measure.rank(case.outputs, case.labels, label, pair, count)
            images += [dataset.test_images[torch.tensor(top)] for top in ranking.tops]
            rows += [f"{dataset.classes[label]}, branch {branch + 1}" for branch in pair]
            rows[-1] += f" ({ranking.overlap} of {count} in both, rank correlation {ranking.spearman:.2f})"
        record.figure(
            f"figure-{number}",
            figures.gallery,
            {"images": torch.stack(images), "row_names": rows, "columns": 20},
            f"Figure {number}: images of a class that two branches are surest of",
            f"Test images of each class by falling logit of the true class, the top {share:.0%} (at least 5), for the "
            "two branches whose centred responses to these classes are strongest. "
            f"{note}",
        )


def _training(record: Run, dataset: ImageSet, models: Sequence[Model], history: History, note: str) -> None:
    floor = loss_floor(len(dataset.classes))
    record.figure(
        "training",
        figures.training,
        {
            "names": [f"M={model.branches}, seed {model.seed}" for model in models],
            "loss": [[loss - floor for loss in history.course("loss", index)] for index in range(len(models))],
            "accuracy": [history.course("test_accuracy", index) for index in range(len(models))],
        },
        "Training",
        f"Loss: augmented images, mean over each epoch; it cannot fall below {floor:.4f} nats because its targets are "
        f"soft. Accuracy: on up to 2,000 test images. {note}",
    )
