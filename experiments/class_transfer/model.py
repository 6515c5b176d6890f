"""Make the networks of a run, from its setup, and load those of a run that is there."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import bsfast
from experiments.class_transfer import discriminator as judges
from experiments.class_transfer.decomposer import Decomposer
from experiments.class_transfer.discriminator import Discriminator
from experiments.class_transfer.generator import Generator, make_branch
from experiments.class_transfer.setup import Setup
from experiments.class_transfer.smoothers import make_smoother
from experiments.class_transfer.training import Players
from experiments.common.checkpoint import load_checkpoint
from experiments.common.record import Run
from experiments.common.resumable import CHECKPOINT


def make_players(setup: Setup, num_classes: int) -> Players:
    """Make generator, discriminator and the average, from the setup's seed.

    Args:
        setup: Widths, smoother, seed and device.
        num_classes: Number of classes.

    Returns:
        The networks, on the setup's device.

    Raises:
        ValueError: If there are no default widths for the image size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        decomposer = make_decomposer(setup, num_classes)
        if setup.discriminator_widths is None and setup.image_size not in judges.WIDTHS:
            raise ValueError(
                f"make_players: discriminator_widths must be given for images of {setup.image_size} pixels, got None"
            )
        widths = setup.discriminator_widths or judges.WIDTHS[setup.image_size]
        judge = Discriminator(setup.image_size, num_classes, *widths)
    return Players.start(decomposer.to(setup.device), judge.to(setup.device))


def make_decomposer(setup: Setup, num_classes: int) -> Decomposer:
    """Make the generator, with PyTorch's global random numbers.

    Args:
        setup: Widths and smoother.
        num_classes: Number of classes.

    Returns:
        The generator, on the CPU.
    """
    smoother = make_smoother(
        setup.smoother,
        image_size=setup.image_size,
        bands=setup.branches,
        sigma=setup.sigma,
        velocity=setup.velocity,
    )
    return Decomposer(bsfast.fuse(make_branches(setup, num_classes)), smoother, num_classes, setup.inputs)


def make_branches(setup: Setup, num_classes: int) -> list[Generator]:
    """Make the branches, apart from each other, with PyTorch's global random numbers."""
    # Of He's weights alone, f would begin as noise that drowns R.
    scale = 0.1 / math.sqrt(setup.branches) if setup.output_scale is None else setup.output_scale
    return [make_branch(setup.image_size, num_classes, setup.widths, scale) for _ in range(setup.branches)]


def load_trained(folder: Path | str, device: str = "cpu") -> tuple[Decomposer, tuple[str, ...], Setup]:
    """Load the averaged generator of a run from its checkpoint.

    Args:
        folder: The run's folder.
        device: Where the generator goes.

    Returns:
        The generator, without gradients; the names of its classes; the run's choices.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the run is of another experiment or its checkpoint is damaged.
    """
    record = Run.load(folder)
    if record.experiment != "class-transfer":
        raise ValueError(f"load_trained: folder must be of a class transfer, got one of {record.experiment}")
    setup, classes = Setup.from_json(record.config), record.metrics.get("classes")
    identity = record.metrics.get("identity")
    if classes is None or identity is None:
        raise FileNotFoundError(f"load_trained: {record.folder} must hold a training that began, got none")
    state = load_checkpoint(record.folder / CHECKPOINT, identity, device=device)
    with torch.random.fork_rng(devices=[]):
        decomposer = make_decomposer(setup, len(classes)).to(device)
    decomposer.load_state_dict(state["nets"]["average"])
    return decomposer.requires_grad_(False), tuple(classes), setup
