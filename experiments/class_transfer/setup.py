"""What to train: every choice of a class-transfer run, and the budgets that make the choices for a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.common.setup import BaseSetup, fit_to_device, resolve_budget

# What a budget chooses; all else is the default of Setup. "half" is the accelerator's 16-bit type.
BUDGETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "device": "cpu",
        "image_size": 32,
        "widths": (4, 16),
        "discriminator_widths": (8, 64),
        "batch_size": 16,
        "steps": 2000,
        "lr": 5e-4,
        "train_images": 3000,
        "test_images": 300,
        "report_steps": 100,
        "time_limit": 480.0,
    },
    "gpu": {
        "device": "cuda",
        "image_size": 64,
        "batch_size": 32,
        "steps": 20_000,
        "train_images": 12_000,
        "test_images": 1500,
        "precision": "half",
        "time_limit": 540.0,
    },
    "paper": {"device": "cuda", "image_size": 256, "precision": "half"},
}
# Of synthetic data, of which there is no end, where a budget does not say.
_SYNTHETIC = {"train_images": 15_000, "test_images": 1500}


@dataclass(frozen=True)
class Setup(BaseSetup):
    """What to train and how.

    Attributes:
        budget: Name of the budget that made the choices not given.
        data: ``"SynthAnimals"``, ``"SynthFaces"``, ``"CIFAR-10"``, or a folder or archive.
        classes: Names of the classes taken; None is all, or cat, dog and horse of CIFAR-10.
        image_size: Height and width, in pixels.
        branches: M.
        smoother: ``"gaussian"``, ``"learnt"``, ``"tv"`` or ``"anisotropic"``.
        inputs: What branch k sees: ``"image"`` or ``"bands"``, its own band.
        sigma: Width of what a smoother that is not learnt removes, in pixels; None is a 16th of the image.
        velocity: Network of the learnt smoother, ``"spatial"`` or ``"channel"``.
        warm_start: Steps in which the learnt smoother alone imitates the Gaussian, before the training.
        widths: Channels of a branch at full resolution and at most; None is by the image's size.
        discriminator_widths: Likewise.
        output_scale: Factor on a branch's last initial weights; None is 0.1 / sqrt(M).
        seed: Seed of everything random.
        train_images: Number of training images, of real ones taken at random; None is all, or a default.
        test_images: Number of test images, likewise.
        steps: Steps of both players.
        batch_size: Images a step.
        accumulation: Parts that a batch is computed in.
        lr: Learning rate.
        weight_decay: L2 factor on all parameters.
        r1: Factor of the gradient penalty, a sum over pixels; by default 1 at 256 pixels, and in proportion to their
            number.
        average_decay: Of the moving average of the generator, which is what is evaluated.
        time_limit: Limit of the training time in s, or None.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: ``"cpu"`` or ``"cuda"``.
        classifier_steps: Training steps of the classifier that judges the transferred images.
        score_images: Synthetic images whose layers the branches are compared with; 0 is none.
        photographs: Folder or archive of class folders whose cats are segmented as pictures, or None.
        report_steps: Steps between sheets of samples.
        save_seconds: Time between checkpoints, in s.
        tensorboard: Whether TensorBoard logs are written.
    """

    budget: str = "cpu"
    data: str = "SynthAnimals"
    classes: tuple[str, ...] | None = None
    image_size: int = 256
    branches: int = 9
    smoother: str = "gaussian"
    inputs: str = "image"
    sigma: float | None = None
    velocity: str = "spatial"
    warm_start: int = 0
    widths: tuple[int, int] | None = None
    discriminator_widths: tuple[int, int] | None = None
    output_scale: float | None = None
    seed: int = 0
    train_images: int | None = None
    test_images: int | None = None
    steps: int = 100_000
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 1e-4
    weight_decay: float = 1e-4
    r1: float = 1.0
    average_decay: float = 0.999
    time_limit: float | None = None
    precision: str = "fp32"
    device: str = "cpu"
    classifier_steps: int = 600
    score_images: int = 96
    photographs: str | None = None
    report_steps: int = 500
    save_seconds: float = 60.0
    tensorboard: bool = False


def choose(budget: str, given: dict[str, Any]) -> Setup:
    """Complete the choices that were given by those of a budget.

    Args:
        budget: ``"cpu"``, ``"gpu"``, ``"paper"``, or ``"auto"``: gpu where there is a CUDA device, else cpu.
        given: Choices by their names in :class:`Setup`; they count more than the budget's.

    Returns:
        The setup.

    Raises:
        ValueError: If the choices do not fit each other.
        RuntimeError: If the device is not there.
    """
    budget = resolve_budget(budget)
    choices = BUDGETS[budget] | given
    if given.get("image_size", choices["image_size"]) != BUDGETS[budget]["image_size"]:
        # A budget's widths belong to its image size.
        choices |= {name: given.get(name) for name in ("widths", "discriminator_widths")}
    if choices.get("data") == "CIFAR-10":
        choices["image_size"] = given.get("image_size", 32)
    if choices.get("data", Setup.data).startswith("Synth"):
        choices = _SYNTHETIC | choices
    elif "train_images" not in given:
        choices |= {"train_images": None, "test_images": given.get("test_images")}
    choices = fit_to_device(choices, budget)
    smoother = choices.get("smoother", Setup.smoother)
    choices.setdefault("inputs", "image" if smoother == "gaussian" else "bands")
    choices.setdefault("r1", (choices.get("image_size", Setup.image_size) / Setup.image_size) ** 2)
    if smoother == "gaussian" and choices["inputs"] == "bands":
        raise ValueError("choose: inputs must be image for the smoother gaussian, which makes no bands, got bands")
    if choices.get("photographs") and choices.get("data", Setup.data) != "SynthAnimals":
        raise ValueError(
            "choose: photographs must be left out unless the data is SynthAnimals, whose cats' eyes are segmented, got "
            f"the data {choices['data']}"
        )
    if choices.get("warm_start", 0) and smoother != "learnt":
        raise ValueError(f"choose: warm_start is of the smoother learnt, got the smoother {smoother}")
    return Setup(budget=budget, **choices)
