"""Judge the paper's claims about the classifier, Figures 5 and 6.

The claims are about trained networks. Where the sum's test accuracy is below three times chance, no claim but the one
that the sum classifies is judged, whichever way the numbers point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from bsfast import analysis
from experiments.classifier.loss import saturated_shares

_LEARNT = 3.0


class Claim(NamedTuple):
    """A claim of the paper, what was measured, and whether it holds (None: this run cannot tell)."""

    figure: str
    claim: str
    measured: str
    holds: bool | None


def not_learnt(outputs: Tensor, labels: Tensor) -> str | None:
    """Say why a network counts as untrained, or return None if it has learnt.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.

    Returns:
        The reason, or None.
    """
    accuracy = (outputs.sum(0).argmax(1) == labels).float().mean().item()
    chance = 1 / outputs.shape[2]
    if accuracy >= _LEARNT * chance:
        return None
    cut_off = saturated_shares(outputs.sum(0))[1]
    return (
        f"M={len(outputs)} has not learnt: test accuracy {accuracy:.1%}, chance {chance:.1%}, all logits outside "
        f"[-1, 1] on {cut_off:.0%} of the images"
    )


def withhold(claim: Claim, reason: str | None) -> Claim:
    """Take a claim's verdict back if there is a reason, which is added to what was measured."""
    return claim if reason is None else claim._replace(measured=f"{claim.measured}; {reason}", holds=None)


def judge_counts(counts: Mapping[int, tuple[int, int]]) -> list[Claim]:
    """Judge Figure 5, left: silent branches become more with M, active ones do not.

    Args:
        counts: M to (active, silent).

    Returns:
        Two claims; not tested unless models of the M they name are there.
    """
    silent = "; ".join(f"M={size}: {counts[size][1]} silent" for size in sorted(counts))
    active = "; ".join(f"M={size}: {counts[size][0]} active" for size in sorted(counts))
    grows = constant = None
    if {8, 16, 32} <= counts.keys():
        grows = counts[32][1] > counts[16][1] >= counts[8][1]
    if {16, 32} <= counts.keys():
        constant = counts[32][0] <= 1.5 * counts[16][0]
    return [
        Claim(
            "Fig. 5 left",
            "More branches means more silent ones: silent(32) > silent(16) ≥ silent(8).",
            silent if grows is not None else f"{silent}; needs models of M=8, 16 and 32",
            grows,
        ),
        Claim(
            "Fig. 5 left",
            "The number of active branches hardly grows: active(32) ≤ 1.5 active(16).",
            active if constant is not None else f"{active}; needs models of M=16 and 32",
            constant,
        ),
    ]


def judge_covariance(initial: Tensor, trained: Tensor) -> Claim:
    """Judge Figure 5, middle: training makes the responses of different branches less alike.

    Args:
        initial: Branch outputs before training, shape ``(M, N, C)``.
        trained: The same after training.

    Returns:
        The claim; not tested with one branch.
    """
    before, after = (
        analysis.offdiag_ratio(analysis.covariance(analysis.response_matrix(outputs))) for outputs in (initial, trained)
    )
    return Claim(
        "Fig. 5 middle",
        "Training makes the covariance of the branches more diagonal: mean |off-diagonal| / mean diagonal falls.",
        f"{before:.3f} at the start, {after:.3f} trained (M={len(trained)})",
        after < before if len(trained) > 1 else None,
    )


def judge_outputs(outputs: Tensor, labels: Tensor) -> list[Claim]:
    """Judge Figure 6: branches differ in strength, some are silent, and their sum classifies.

    Args:
        outputs: Branch outputs of the trained model, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.

    Returns:
        Three claims.
    """
    size = len(outputs)
    norms = analysis.response_matrix(outputs).norm(dim=1)
    ratio = (norms.max() / norms.median()).item()
    silent = size - int(analysis.active_branches(outputs).sum())
    weakest = (norms.min() / norms.max()).item()
    columns = analysis.class_summary(outputs, labels).sum(0)
    right = int((columns.argmax(0) == columns.new_tensor(range(len(columns)))).sum())
    return [
        Claim(
            "Fig. 6",
            "Branches differ much in strength: the largest response norm is at least twice the median.",
            f"{ratio:.2f} times (M={size})",
            ratio >= 2 if size > 1 else None,
        ),
        Claim(
            "Fig. 6",
            "Some branches are silent (response norm below 10 % of the largest) at M=16 or 32.",
            f"{silent} of {size} silent; the weakest has {weakest:.0%} of the largest norm",
            silent > 0 if size in {16, 32} else None,
        ),
        Claim(
            "Fig. 6",
            "The sum classifies: for every true class the largest mean logit is its own.",
            f"{right} of {len(columns)} classes",
            right == len(columns),
        ),
    ]
