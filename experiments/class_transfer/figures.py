"""The paper's Figures 9 to 11, 13 to 15 and 18 to 20, and a grid of transfers, from a trained generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.class_transfer import draw
from experiments.class_transfer.augment import to_signal
from experiments.class_transfer.decomposer import Decomposer, Decomposition, decompose_all, magnified, subset_sum
from experiments.class_transfer.pictures import amplified, gains, reduced, shown_images, to_pixels, two_groups
from experiments.common.data import ImageSet
from experiments.common.record import Run

ALPHAS = (-1.0, 0.0, 1.0, 2.0, 3.0)
_IMAGES = 8
_DECOMPOSED = 2  # of Figures 10 and 11
_OF_A_CLASS = 4  # images of Figures 18 to 20
_UNCORRELATED = 0.5


def draw_figures(record: Run, decomposer: Decomposer, dataset: ImageSet, made: str) -> None:
    """Draw all figures.

    Args:
        record: Gets the figures, and the claim about Figure 15.
        decomposer: Trained, on any device.
        dataset: Its test images are shown. Two classes stand for the paper's faces, with Figures 10 and 13, more for
            its animals, with Figures 11 and 14.
        made: How the generator and the data were made, for the notes.
    """
    sheets = _Sheets(record, made)
    x, labels = shown_images(dataset, _IMAGES)
    parts = decompose_all(decomposer, x, labels)
    classes, faces = dataset.classes, len(dataset.classes) == 2

    transfers = [decompose_all(decomposer, x, torch.full_like(labels, label)).f for label in range(len(classes))]
    note = "Test images x, and f with each class as the target."
    sheets.add("transfer", "Transfer", torch.stack([x, *transfers], 1), ["x", *classes], note)
    note = "Above test images x, below f with the image's own class as the target."
    own = [classes[label] for label in labels]
    sheets.add("figure-9", "Figure 9: re-generation", torch.stack([x, parts.f]), own, note, rows=["x", "f"])
    _parts(sheets, 10 if faces else 11, parts)
    _sweep(sheets, 13 if faces else 14, parts)
    if len(parts.v) > 1:
        _textures(sheets, x, parts)
    for number, (label, name) in zip((18, 19, 20), enumerate(classes), strict=False):
        members = (dataset.test_labels == label).nonzero()[:_OF_A_CLASS, 0]
        if len(members):
            shown = to_signal(dataset.test_images[members])
            _columns(sheets, number, name, shown, decompose_all(decomposer, shown, dataset.test_labels[members]))


class _Sheets:
    """Adds sheets of images ``(rows, columns, 3, H, W)`` to a record."""

    def __init__(self, record: Run, made: str) -> None:
        self.record, self.made = record, made

    def add(
        self,
        name: str,
        title: str,
        images: Tensor,
        columns: Sequence[str],
        note: str,
        *,
        rows: Sequence[str] | None = None,
    ) -> None:
        data = {"images": reduced(to_pixels(images)), "columns": columns, "rows": rows}
        self.record.figure(name, draw.samples, data, title, f"{note} {self.made}")


def _parts(sheets: _Sheets, number: int, parts: Decomposition) -> None:
    """Each branch's part with more contrast, and what it is in the image, for the first two images."""
    strong, shown = amplified(parts.v), range(len(parts.f))[:_DECOMPOSED]
    images = torch.cat([torch.stack([strong[:, image], parts.f[image] + parts.v[:, image]]) for image in shown])
    factors = ", ".join(f"{gain:.3g}" for gain in gains(parts.v).tolist())
    note = (
        "Test images. v: what each branch adds, with more contrast: grey is 0, and 99.5 % of a branch's pixels are "
        f"within the range; factors {factors}. f + v: the output with that part once more, without amplification."
    )
    sheets.add(
        f"figure-{number}",
        f"Figure {number}: decomposition",
        images,
        _names(parts),
        note,
        rows=["v", "f + v"] * len(shown),
    )


def _sweep(sheets: _Sheets, number: int, parts: Decomposition) -> None:
    """The first image with one branch's part scaled."""
    images = torch.stack([
        torch.stack([magnified(parts, branch, alpha)[0] for branch in range(len(parts.v))]) for alpha in ALPHAS
    ])
    note = "A test image, f with one branch's part scaled by alpha; 1 is f itself."
    rows = [f"{alpha:g}" for alpha in ALPHAS]
    sheets.add(f"figure-{number}", f"Figure {number}: one part, scaled", images, _names(parts), note, rows=rows)


def _textures(sheets: _Sheets, x: Tensor, parts: Decomposition) -> None:
    """Sums of the finer and of the coarser branches."""
    groups = two_groups(parts.v)
    fine, coarse = (subset_sum(parts, group) for group in groups)
    largest = gains(torch.stack([fine, coarse])).min()
    images = torch.stack(
        [x, parts.f, parts.R, largest * fine, largest * coarse, parts.R + fine, parts.R + coarse], dim=1
    )
    members = ["; ".join(f"v{index + 1}" for index in group) for group in groups]
    note = (
        f"T1 is the sum of {members[0]} and T2 that of {members[1]}: 2-means over the branches' spectra and colours; "
        f"both times {largest:.3g}."
    )
    columns = ["x", "f", "R", "T1", "T2", "R + T1", "R + T2"]
    sheets.add("figure-15", "Figure 15: texture separation", images, columns, note)
    alike = torch.corrcoef(torch.stack([fine.flatten(), coarse.flatten()]))[0, 1].abs().item()
    claim = f"two subsets of the branches draw different textures: |correlation| below {_UNCORRELATED}"
    sheets.record.claim("Fig. 15", claim, f"{alike:.2f} on {len(x)} test images", alike < _UNCORRELATED)


def _columns(sheets: _Sheets, number: int, name: str, x: Tensor, parts: Decomposition) -> None:
    """Images of one class, R, and all parts."""
    images = torch.stack([x, parts.f, parts.R, *amplified(parts.v)], dim=1)
    note = f"Test images of the class {name}; v: what each branch adds, each with a gain of its own."
    sheets.add(f"figure-{number}", f"Figure {number}: {name}", images, ["x", "f", "R", *_names(parts)], note)


def _names(parts: Decomposition) -> list[str]:
    return [f"v{index + 1}" for index in range(len(parts.v))]
