"""What to train: every choice of a classifier run, and the budgets that make the choices for a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.classifier.model import WIDTHS
from experiments.common.setup import BaseSetup, fit_to_device, resolve_budget

ALL_M = (2, 4, 8, 16, 32)

# What a budget chooses; all else is the default of Setup. "half" is the accelerator's 16-bit type.
# The one-sided clamp has the hard clamp's minima. With the paper's hard one, a short schedule ended at chance: f drifts
# as a whole until all logits of nearly every image are beyond 1 and get no gradient.
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "device": "cpu",
        "widths": WIDTHS["cpu-small"],
        "train_images": 10_000,
        "test_images": 2_000,
        "epochs": 6,
        "clamp": "one_sided",
    },
    "gpu": {
        "device": "cuda",
        "all_m": ALL_M,
        "epochs": 30,
        "clamp": "one_sided",
        "precision": "half",
        "time_limit": 420.0,
        "speed_limit": 30.0,
    },
    "paper": {"device": "cuda", "all_m": ALL_M, "epochs": 200, "precision": "half"},
}


@dataclass(frozen=True)
class Setup(BaseSetup):
    """What to train and how.

    Attributes:
        budget: Name of the budget that made the choices not given.
        branches: M of the model that all figures but Figures 5, left, and 17 are drawn from.
        all_m: Further M, for these figures; all models are trained in one pass over the data.
        seed: Seed of everything random.
        seeds: Number of initialisations of each model; the claims are judged for each.
        widths: Channels of the four stages of a branch.
        clamp: ``"hard"``, ``"one_sided"`` or ``"none"``.
        readout_scale: Factor on the readout's initial values; None is 1 / sqrt(M).
        train_images: Number of training images taken at random; None is all.
        test_images: Number of test images taken at random; None is all.
        epochs: Passes over the training images.
        batch_size: Images a step.
        lr: Peak learning rate.
        weight_decay: L2 factor on all parameters.
        time_limit: Limit of the training time in s, or None; the schedule shrinks to end there.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: ``"cpu"`` or ``"cuda"``.
        save_seconds: Time between checkpoints, in s.
        speed_repeats: Timed rounds of fused against loop; 0 leaves the measurement out.
        speed_limit: Time in s after which no further round is begun.
        tensorboard: Whether TensorBoard logs are written.
    """

    budget: str = "cpu"
    branches: int = 16
    all_m: tuple[int, ...] = ()
    seed: int = 0
    seeds: int = 1
    widths: tuple[int, ...] = WIDTHS["paper"]
    clamp: str = "hard"
    readout_scale: float | None = 1.0
    train_images: int | None = None
    test_images: int | None = None
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    time_limit: float | None = None
    precision: str = "fp32"
    device: str = "cpu"
    save_seconds: float = 60.0
    speed_repeats: int = 20
    speed_limit: float = 120.0
    tensorboard: bool = False

    @property
    def sizes(self) -> list[int]:
        """All M, ascending."""
        return sorted({self.branches, *self.all_m})

    @property
    def init_seeds(self) -> range:
        """Seeds of the initialisations."""
        return range(self.seed, self.seed + self.seeds)


def choose(budget: str, given: dict[str, Any], *, train_images: int, test_images: int) -> Setup:
    """Complete the choices that were given by those of a budget.

    Args:
        budget: ``"cpu"``, ``"gpu"``, ``"paper"``, or ``"auto"``: gpu where there is a CUDA device, else cpu.
        given: Choices by their names in :class:`Setup`; they count more than the budget's.
        train_images: Number of images there are; a budget's subset is at most that.
        test_images: Likewise.

    Returns:
        The setup.

    Raises:
        ValueError: If more images are asked for than there are.
        RuntimeError: If the device is not there.
    """
    budget = resolve_budget(budget)
    choices = BUDGETS[budget].copy()
    for name, available in (("train_images", train_images), ("test_images", test_images)):
        if given.get(name, 0) > available:
            raise ValueError(f"choose: {name} must be at most {available}, all there are, got {given[name]}")
        if name in choices:
            choices[name] = min(choices[name], available)
    return Setup(budget=budget, **fit_to_device(choices | given, budget))
