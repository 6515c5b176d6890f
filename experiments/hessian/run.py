"""Measure the Hessian of a classifier before and after its training, and judge observation 6."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from experiments.classifier.population import Model, Population
from experiments.classifier.run import identity, initial_population
from experiments.classifier.setup import Setup
from experiments.common.checkpoint import load_checkpoint
from experiments.common.data import ImageSet, random_subset
from experiments.common.record import Run
from experiments.common.resumable import CHECKPOINT
from experiments.hessian import figures
from experiments.hessian.measure import Curvature, curvature

_LEARNT = 0.2  # of the way from chance to 1, as for the classifier's other claims
_GOAL = 0.5


class Choices(NamedTuple):
    """What to measure.

    Attributes:
        images: Training images that the loss is averaged over, at most.
        whole_branch_images: Those for the spectra of whole branches; 0 for none.
        clamp: ``"hard"`` or ``"none"``.
        seed: Which images.
    """

    images: int = 2000
    whole_branch_images: int = 128
    clamp: str = "hard"
    seed: int = 0


def run(record: Run, classifier: Run, dataset: ImageSet, setup: Setup, choices: Choices) -> None:
    """Measure the main model of a classifier's run, of its first seed, at both times.

    Args:
        record: Gets the results.
        classifier: Run of the classifier, with its checkpoint.
        dataset: All images of that run's data.
        setup: That run's choices.
        choices: What to measure.

    Raises:
        ValueError: If data or checkpoint are not those of the classifier's run.
    """
    dataset, setup = random_subset(dataset, setup), replace(setup, device="cpu")
    images = min(choices.images, len(dataset.train_images))
    model = Model(setup.branches, setup.seed)
    trained = Population(setup, len(dataset.classes))
    whose = identity(trained.models, dataset, setup)
    state = load_checkpoint(
        classifier.folder / CHECKPOINT, whose, ignore=["training"]
    )  # how it went on does not matter
    trained.net.load_state_dict(state["net"])
    order = torch.randperm(len(dataset.train_images), generator=torch.Generator().manual_seed(choices.seed))
    chosen = order[:images]
    results = {}
    for name, population in (("initial", initial_population(setup, dataset)), ("trained", trained)):
        results[name] = curvature(
            [branch.cpu() for branch in population.branches_of(model)],
            dataset.train_images[chosen],
            dataset.train_labels[chosen],
            dataset.test_images,
            clamp=choices.clamp,
            whole_branch_images=min(choices.whole_branch_images, images),
        )
        record.metric(name, results[name].to_json())
    accuracy = float(classifier.metrics.get(model.name, {}).get("test_accuracy", 0.0))
    record.metric("test_accuracy", accuracy)
    note = (
        f"M={setup.branches}, widths {', '.join(map(str, setup.widths))}, loss averaged over {images:,} "
        f"training images without augmentation, clamp {choices.clamp}, batch normalisation with running statistics; "
        f"the classifier of {classifier.folder.name} after {state['history']['steps']:,} steps, test accuracy "
        f"{accuracy:.1%}. Data: {dataset.note}."
    )
    draw(record, results, setup.branches, note)
    chance = 1 / len(dataset.classes)
    judge(record, results["initial"], results["trained"], learnt=accuracy >= chance + _LEARNT * (1 - chance))


def draw(record: Run, results: dict[str, Curvature], num_branches: int, note: str) -> None:
    """Record the figures.

    Args:
        record: Gets them.
        results: By title of the panel.
        num_branches: M.
        note: What was done.
    """
    betas = [f"{name}, β = {own.interaction.beta:.3f}" for name, own in results.items()]
    record.figure(
        "figure-5-right",
        figures.hessian_maps,
        {"magnitudes": [own.magnitude for own in results.values()], "titles": betas, "num_branches": num_branches},
        "Figure 5, right: |H| of the first layer of all branches",
        "Branch-major, mean of |H| over square cells, one colour scale. β is the share of the squared norm in the "
        f"branches' own blocks. {note}",
    )
    kappas = [f"{name}, mean of pairs {own.interaction.mean_kappa():.3f}" for name, own in results.items()]
    record.figure(
        "hessian-interaction",
        figures.interaction_maps,
        {"kappas": [own.interaction.kappa for own in results.values()], "titles": kappas},
        "Coherence of the branches' Hessian blocks",
        f"‖H_kl‖ / sqrt(‖H_kk‖ ‖H_ll‖), which does not depend on the branches' scales. {note}",
    )
    record.figure(
        "hessian-spectra",
        figures.spectra,
        {"eigenvalues": [own.eigenvalues for own in results.values()], "titles": list(results)},
        "Eigenvalues of every branch's own block of the first layer",
        f"All of them, exactly; one line a branch. {note}",
    )
    known = {name: own.density for name, own in results.items() if own.density is not None}
    if known:
        record.figure(
            "hessian-densities",
            figures.densities,
            {
                "grids": [own.grid for own in known.values()],
                "values": [own.density for own in known.values()],
                "titles": list(known),
            },
            "Spectral density of every whole branch",
            f"Stochastic Lanczos quadrature, 20 steps, one random vector, on fewer images. {note}",
        )
    record.figure(
        "section-8",
        figures.gradient_zeros,
        {
            key: [torch.tensor(own.equilibrium[name]) for own in results.values()]
            for key, name in (("distributive", "distributive_zero"), ("orthogonal", "orthogonal"))
        }
        | {
            "titles": [
                f"{name}, no gradient at f: {own.equilibrium['fitted_samples']:.0%} of samples"
                for name, own in results.items()
            ]
        },
        "Section 8: why gradients of the first layer are small",
        "Of the samples with a gradient at f: pairs of a weight and a sample whose Jacobian is below 1e-3 of its root "
        f"mean square, and others whose Jacobian and gradient at f have a cosine below 0.05. {note}",
    )


def judge(record: Run, initial: Curvature, trained: Curvature, *, learnt: bool) -> None:
    """Record observation 6 and the paper's words about it.

    Args:
        record: Gets the claims.
        initial: Before training.
        trained: After training.
        learnt: Whether the network has learnt enough for its branches to be judged.
    """
    before, after = initial.interaction, trained.interaction
    active = after.mean_kappa(trained.active)
    record.claim(
        "Fig. 5 right",
        "Training makes the first layer's Hessian more nearly block-diagonal: the share β of its squared norm in the "
        "branches' own blocks rises and the mean coherence of pairs of branches falls.",
        f"β from {before.beta:.3f} to {after.beta:.3f}; coherence from {before.mean_kappa():.3f} to "
        f"{after.mean_kappa():.3f} ({active:.3f} among {int(trained.active.sum())} active branches)",
        (after.beta > before.beta and after.mean_kappa() < before.mean_kappa()) if learnt else None,
        observation=6,
    )
    record.claim(
        "Fig. 5 right",
        f"After training the Hessian is almost block-diagonal: β is at least {_GOAL}.",
        f"β = {after.beta:.3f}; {1 / len(after.fro):.3f} if all blocks were alike",
        after.beta >= _GOAL if learnt else None,
    )
