"""``python -m experiments class-transfer``: choices on the command line to a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.common import arguments, resumable
from experiments.common.record import Run

HELP = "image decomposition: branches trained to transfer images between classes"
_SETS = {"animals": "SynthAnimals", "faces": "SynthFaces", "cifar": "CIFAR-10"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; those without a value on the command line do not appear in what is parsed."""
    resumable.add_arguments(
        parser, "cpu, 32 pixels, minutes on 2 cores; gpu, 64 pixels, under 10 minutes; paper, 256 pixels, 100,000 steps"
    )
    add = parser.add_argument
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
    add("--r1", type=arguments.not_negative, help="factor of the gradient penalty (1 at 256 pixels, by area)")
    add("--train-images", type=arguments.count, metavar="N", help="training images")
    add("--test-images", type=arguments.count, metavar="N", help="test images")
    add("--classifier-steps", type=arguments.count, help="training of the classifier that judges f (600)")
    add(
        "--score-images",
        type=arguments.from_zero,
        metavar="N",
        help="of synthetic data, compared with their layers (96)",
    )
    add("--photographs", metavar="DATA", help="cats segmented as pictures: a folder or archive of class folders")
    add("--time-limit", type=arguments.positive, metavar="SECONDS", help="limit of the training time")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of the networks; fp16 scales the losses")
    add(
        "--report-steps", type=arguments.count, metavar="N", help="steps between sheets of samples (cpu: 100, else 500)"
    )


def act(parsed: argparse.Namespace, command: str) -> Path:
    """Run or resume, and write the report.

    Args:
        parsed: What :func:`add_arguments` parsed.
        command: The command line, for the record.

    Returns:
        The report.
    """
    from experiments.class_transfer.data import load, named_by_environment
    from experiments.class_transfer.run import run
    from experiments.class_transfer.setup import Setup, choose

    given = arguments.given(parsed)
    if "data" in given:
        given["data"] = _SETS.get(given["data"]) or str(Path(given["data"]).resolve())
    if "photographs" in given:
        given["photographs"] = str(Path(given["photographs"]).resolve())
    if "resume" in given:
        record = resumable.resume("class-transfer", given)
        if "data" in given:
            record.config["data"] = given["data"]
        setup = Setup.from_json(record.config)
    else:
        out, budget = given.pop("out", Path("runs")), given.pop("budget", "auto")
        if "data" not in given and budget == "paper":
            given["data"] = named_by_environment()
        setup = choose(budget, given)
        record = Run("class-transfer", {"command": command} | setup.to_json(), out)

    def work() -> None:
        dataset = load(setup)
        print(f"Data: {dataset.note}.")
        run(record, dataset, setup)

    return resumable.complete(record, work)


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
