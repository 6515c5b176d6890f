"""``python -m experiments class-transfer``: choices on the command line to a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.common import arguments
from experiments.common.record import Run
from experiments.common.report import write_report

HELP = "image decomposition: branches trained to transfer images between classes"
_SETS = {"animals": "SynthAnimals", "faces": "SynthFaces", "cifar": "CIFAR-10"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; those without a value on the command line do not appear in what is parsed."""
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add(
        "--budget",
        choices=("auto", "cpu", "gpu", "paper"),
        help="scale: cpu, 32 pixels, minutes on 2 cores; gpu, 64 pixels, under 10 minutes; paper, 256 pixels, 100,000 "
        "steps; auto (default) by the device",
    )
    add("--resume", type=Path, metavar="RUN", help="continue the run in this folder, with its own options")
    add("--seed", type=arguments.seed, help="seed of everything random (0)")
    add("--out", type=Path, metavar="FOLDER", help="where runs go (runs)")
    add(
        "--data",
        metavar="DATA",
        help="animals (default) or faces, synthetic; cifar, found by BSFAST_DATA; or a folder or archive of class "
        "folders, such as AFHQ's or CelebA-HQ's (default with --budget paper: what BSFAST_DATA names)",
    )
    add("--classes", type=classes, metavar="A,B,...", help="classes taken (all; of CIFAR-10 cat,dog,horse)")
    add("--image-size", type=arguments.count, metavar="PIXELS", help="height and width (cpu: 32, gpu: 64, paper: 256)")
    add("--branches", type=arguments.count, metavar="M", help="branches (9)")
    add(
        "--smoother",
        choices=("gaussian", "learnt", "tv", "anisotropic"),
        help="the smooth part R (gaussian): the paper's two, total-variation flow, anisotropic diffusion",
    )
    add("--inputs", choices=("image", "bands"), help="what a branch sees (gaussian: image, else its own band)")
    add("--sigma", type=arguments.positive, metavar="PIXELS", help="width of what R leaves out (a 16th of the image)")
    add("--velocity", choices=("spatial", "channel"), help="network of the learnt diffusion (spatial)")
    add("--warm-start", type=arguments.from_zero, metavar="STEPS", help="learnt R first imitates the gaussian (0)")
    add("--widths", type=widths, metavar="BASE,MOST", help="channels of a branch at full size and at most")
    add("--discriminator-widths", type=widths, metavar="BASE,MOST", help="likewise of the discriminator")
    add("--output-scale", type=arguments.positive, help="factor on a branch's last initial weights (0.1/sqrt(M))")
    add("--steps", type=arguments.count, help="steps of both players (cpu: 2000, gpu: 20000, paper: 100000)")
    add("--batch-size", type=arguments.count, metavar="N", help="images a step (cpu: 16, gpu: 32, paper: 8)")
    add("--accumulation", type=arguments.count, metavar="N", help="parts that a batch is computed in, for memory (1)")
    add("--lr", type=arguments.positive, help="learning rate of Adam (cpu: 5e-4, else 1e-4)")
    add("--weight-decay", type=arguments.not_negative, help="L2 factor (1e-4)")
    add("--r1", type=arguments.not_negative, help="factor of the gradient penalty (1)")
    add("--train-images", type=arguments.count, metavar="N", help="training images")
    add("--test-images", type=arguments.count, metavar="N", help="test images")
    add("--classifier-steps", type=arguments.count, help="training of the classifier that judges f (600)")
    add(
        "--score-images",
        type=arguments.from_zero,
        metavar="N",
        help="of synthetic data, compared with their layers (96)",
    )
    add("--time-limit", type=arguments.positive, metavar="SECONDS", help="limit of the training time")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of the networks; fp16 scales the losses")
    add("--device", choices=("cpu", "cuda"), help="where to train")
    add(
        "--report-steps", type=arguments.count, metavar="N", help="steps between sheets of samples (cpu: 100, else 500)"
    )
    add("--save-seconds", type=arguments.not_negative, metavar="SECONDS", help="time between checkpoints (60)")
    add("--tensorboard", action="store_true", default=argparse.SUPPRESS, help="also write TensorBoard logs")


def act(parsed: argparse.Namespace, command: str) -> Path:
    """Run or resume, and write the report.

    Args:
        parsed: What :func:`add_arguments` parsed.
        command: The command line, for the record.

    Returns:
        The report.
    """
    from experiments.class_transfer.data import named_by_environment
    from experiments.class_transfer.setup import choose

    given = {name: value for name, value in vars(parsed).items() if name != "act"}
    resumed = given.pop("resume", None)
    if resumed is not None:
        return resume(resumed, given)
    out, budget = given.pop("out", Path("runs")), given.pop("budget", "auto")
    if "data" in given:
        named = given["data"]
        given["data"] = _SETS.get(named) or str(Path(named).resolve())
    elif budget == "paper":
        given["data"] = named_by_environment()
    setup = choose(budget, given)
    record = Run("class-transfer", {"command": command} | setup.to_json(), out)
    return complete(record, setup)


def resume(folder: Path, given: dict[str, Any]) -> Path:
    """Continue a run from its checkpoint, with its own choices.

    Args:
        folder: The run's folder.
        given: Further options; only a new place of the data may be among them.

    Returns:
        The report.

    Raises:
        ValueError: If there are other options, or the run is of another experiment.
    """
    from experiments.class_transfer.setup import Setup

    data = given.pop("data", None)
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--resume continues with the run's own options and takes --data only, got {names} as well")
    record = Run.resume(folder)
    if record.experiment != "class-transfer":
        raise ValueError(f"--resume must name a run of class-transfer, got one of {record.experiment}")
    if data is not None:
        record.config["data"] = _SETS.get(data) or str(Path(data).resolve())
    return complete(record, Setup.from_json(record.config))


def complete(record: Run, setup: Any) -> Path:
    """Run to the end and write the report; say how to go on if that is stopped."""
    from experiments.class_transfer.data import load
    from experiments.class_transfer.model import CHECKPOINT
    from experiments.class_transfer.run import run
    from experiments.common.interrupt import Stopped

    try:
        dataset = load(setup)
        print(f"Data: {dataset.note}.")
        run(record, dataset, setup)
    except (Stopped, KeyboardInterrupt) as stop:
        going_on = f"go on with: python -m experiments class-transfer --resume {record.folder}"
        if not (record.folder / CHECKPOINT).exists():
            going_on = "there is no checkpoint yet"
        raise Stopped(f"{stop or 'stopped'}; {going_on}") from None
    finally:
        record.close()
    record.finish()
    return write_report([record], record.folder / "report.html")


def widths(text: str) -> tuple[int, int]:
    """Two channel counts."""
    words = text.split(",")
    if (
        len(words) != 2
        or not all(word.strip().isdecimal() for word in words)
        or not 1 <= int(words[0]) <= int(words[1])
    ):
        raise argparse.ArgumentTypeError(f"must be two integers BASE,MOST with 1 <= BASE <= MOST, got {text!r}")
    return int(words[0]), int(words[1])


def classes(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    names = tuple(word.strip() for word in text.split(","))
    if len(names) < 2 or not all(names):
        raise argparse.ArgumentTypeError(f"must be two names or more with commas between, got {text!r}")
    return names
