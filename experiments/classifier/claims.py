"""Judge the paper's claims about the classifier, Figures 5 to 8 and section 8, once for each seed.

The claims are about trained networks. Where a network's test accuracy is less than a fifth of the way from chance to 1
(28 % for ten classes), no claim about it but the one that its sum classifies is judged, whichever way the numbers
point; that more branches classify better is judged if one of the two networks has learnt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from bsfast import analysis
from experiments.classifier import measure
from experiments.classifier.loss import saturated_shares
from experiments.common.record import Run

_LEARNT = 0.2
_TOP = 0.02


@dataclass(frozen=True)
class Trained:
    """A model's branch outputs on the test set, shape ``(M, N, C)``, before and after training."""

    initial: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Case:
    """All that was trained from one seed.

    Attributes:
        models: M to the model.
        main: The M that most claims are judged on.
        labels: True classes of the test set, shape ``(N,)``.
        gallery: Classes of Figure 8.
        equilibrium: As :func:`experiments.classifier.measure.equilibrium` returns it, of the main model.
    """

    models: Mapping[int, Trained]
    main: int
    labels: Tensor
    gallery: Sequence[int] = ()
    equilibrium: Mapping[str, float | list[float]] = field(default_factory=dict)

    @property
    def outputs(self) -> Tensor:
        """Branch outputs of the trained main model."""
        return self.models[self.main].outputs

    def counts(self) -> dict[int, tuple[int, int]]:
        """M to the numbers of active and silent branches."""
        active = {size: int(analysis.active_branches(model.outputs).sum()) for size, model in self.models.items()}
        return {size: (count, size - count) for size, count in active.items()}

    def accuracy(self, size: int) -> float:
        """Test accuracy of a model's sum."""
        return accuracy(self.models[size].outputs.sum(0), self.labels)


class Finding(NamedTuple):
    """What one seed says: a number, its description, and whether the criterion is met (None: cannot tell)."""

    number: float
    text: str
    holds: bool | None


class Criterion(NamedTuple):
    """A claim of the paper with its criterion, how to measure it, and the models it needs (empty: the main one)."""

    figure: str
    observation: int | None
    claim: str
    measure: Callable[[Case], Finding]
    needs: tuple[int, ...] = ()


def accuracy(f: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest logit is that of their class."""
    return (f.argmax(1) == labels).float().mean().item()


def not_learnt(outputs: Tensor, labels: Tensor) -> str | None:
    """Say why a network counts as untrained, or return None if it has learnt.

    Args:
        outputs: Branch outputs, shape ``(M, N, C)``.
        labels: True classes, shape ``(N,)``.

    Returns:
        The reason, or None.
    """
    reached, chance = accuracy(outputs.sum(0), labels), 1 / outputs.shape[2]
    if reached >= chance + _LEARNT * (1 - chance):
        return None
    cut_off = saturated_shares(outputs.sum(0))[1]
    return (
        f"M={len(outputs)} has not learnt: test accuracy {reached:.1%}, chance {chance:.1%}, all logits outside "
        f"[-1, 1] on {cut_off:.0%} of the images"
    )


def judge(record: Run, cases: Sequence[Case]) -> None:
    """Judge every criterion for every seed, and record it.

    Args:
        record: Gets the claims.
        cases: One a seed.
    """
    for criterion in CRITERIA:
        findings = [find(criterion, case) for case in cases]
        record.claim(
            criterion.figure,
            criterion.claim,
            describe(findings),
            [finding.holds for finding in findings],
            observation=criterion.observation,
        )


def find(criterion: Criterion, case: Case) -> Finding:
    """Judge one criterion for one seed; not tested where a model is missing or has not learnt."""
    needs = criterion.needs or (case.main,)
    missing = [size for size in needs if size not in case.models]
    if missing:
        return Finding(math.nan, f"needs models of M={', '.join(map(str, missing))}", None)
    finding = criterion.measure(case)
    reasons = [not_learnt(case.models[size].outputs, case.labels) for size in needs]
    reason = next(filter(None, reasons), None)
    # That many branches stay at chance where few learn contradicts "more is better" in the clearest way.
    judged = criterion.measure is sum_classifies or (criterion.measure is more_is_better and not all(reasons))
    if reason is None or judged:
        return finding
    return finding._replace(text=f"{finding.text}; {reason}", holds=None)


def describe(findings: Sequence[Finding]) -> str:
    """Put the numbers of all seeds, their mean and their spread into words."""
    judged = [finding for finding in findings if finding.holds is not None and math.isfinite(finding.number)]
    numbers = [finding.number for finding in judged]
    first = findings[0].text
    if len(findings) == 1 or not numbers:
        return first
    held = sum(bool(finding.holds) for finding in judged)
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    untold = f"; {len(findings) - len(judged)} cannot tell" if len(judged) < len(findings) else ""
    return (
        f"{statistics.mean(numbers):.3g} ± {spread:.2g} (mean, standard deviation over {len(numbers)} seeds; met with "
        f"{held} of {len(judged)}{untold}); first seed: {first}"
    )


def specialized(case: Case) -> Finding:
    """Energy-weighted selectivity of the branches, after training against before."""
    before, after = (
        _mean_selectivity(outputs, case.labels) for outputs in (case.models[case.main].initial, case.outputs)
    )
    return Finding(after - before, f"{before:.3f} at the start, {after:.3f} trained (M={case.main})", after > before)


def collaborates(case: Case) -> Finding:
    """Accuracy of the sum against that of the best branch alone."""
    together = case.accuracy(case.main)
    alone = max(accuracy(own, case.labels) for own in case.outputs)
    holds = together > alone if case.main > 1 else None
    return Finding(together - alone, f"{together:.1%} together, {alone:.1%} the best branch alone", holds)


def more_is_better(case: Case) -> Finding:
    """Test accuracy of 16 branches against that of 2."""
    few, many = case.accuracy(2), case.accuracy(16)
    return Finding(many - few, f"{few:.1%} with M=2, {many:.1%} with M=16", many > few)


def less_correlated(case: Case) -> Finding:
    """Off-diagonal ratio of the covariance, after training against before."""
    before, after = (
        analysis.offdiag_ratio(analysis.covariance(analysis.response_matrix(outputs)))
        for outputs in (case.models[case.main].initial, case.outputs)
    )
    holds = after < before if case.main > 1 else None
    return Finding(after, f"{before:.3f} at the start, {after:.3f} trained (M={case.main})", holds)


def silent_grow(case: Case) -> Finding:
    """Silent branches of 8, 16 and 32."""
    counts = case.counts()
    silent = [counts[size][1] for size in (8, 16, 32)]
    return Finding(silent[2], _listed(counts, 1, "silent"), silent[2] > silent[1] >= silent[0])


def active_constant(case: Case) -> Finding:
    """Active branches of 16 and 32."""
    counts = case.counts()
    return Finding(
        counts[32][0] / counts[16][0] if counts[16][0] else math.nan,
        _listed(counts, 0, "active"),
        counts[32][0] <= 1.5 * counts[16][0],
    )


def some_silent(case: Case) -> Finding:
    """Silent branches of 16 and 32, whichever there are."""
    counts = {size: count for size, count in case.counts().items() if size in {16, 32}}
    if not counts:
        return Finding(math.nan, "needs a model of M=16 or 32", None)
    weakest = {}
    for size in counts:
        norms = analysis.response_matrix(case.models[size].outputs).norm(dim=1)
        weakest[size] = f"M={size}: the weakest has {(norms.min() / norms.max()).item():.0%} of the largest norm"
    silent = max(count[1] for count in counts.values())
    return Finding(silent, f"{_listed(counts, 1, 'silent')}; {'; '.join(weakest.values())}", silent > 0)


def strengths_differ(case: Case) -> Finding:
    """Largest response norm against the median."""
    norms = analysis.response_matrix(case.outputs).norm(dim=1)
    ratio = (norms.max() / norms.quantile(0.5)).item()
    return Finding(ratio, f"{ratio:.2f} times (M={case.main})", ratio >= 2 if case.main > 1 else None)


def inter_class(case: Case) -> Finding:
    """Pairs (branch, class) that stand out."""
    pairs = measure.inter_class_pairs(case.outputs, case.labels)
    total = case.main * case.outputs.shape[2]
    return Finding(pairs, f"{pairs} of {total} pairs", pairs >= 2)


def intra_class(case: Case) -> Finding:
    """Classes whose samples two active branches rank differently."""
    found = measure.intra_class_classes(case.outputs, case.labels)
    holds = len(found) >= 3 if case.counts()[case.main][0] > 1 else None
    return Finding(len(found), f"{len(found)} of {case.outputs.shape[2]} classes", holds)


def tops_differ(case: Case) -> Finding:
    """Overlap and rank correlation of the two most informative branches on the classes of Figure 8."""
    if case.main < 2 or not case.gallery:
        return Finding(math.nan, "needs two branches", None)
    pair = measure.most_informative(case.outputs, case.labels, case.gallery)
    parts, met, correlations = [], [], []
    for label in case.gallery:
        count = top_count(case.labels, label, _TOP)
        ranking = measure.rank(case.outputs, case.labels, label, pair, count)
        met.append(ranking.overlap <= 0.3 * count and ranking.spearman < 0.5)
        correlations.append(ranking.spearman)
        parts.append(f"{ranking.overlap} of {count} in both, rank correlation {ranking.spearman:.2f}")
    holds = None if any(map(math.isnan, correlations)) else all(met)
    return Finding(max(correlations), f"branches {pair[0] + 1} and {pair[1] + 1}: {'; '.join(parts)}", holds)


def few_fitted(case: Case) -> Finding:
    """Share of samples with no gradient left at f."""
    if not case.equilibrium:
        return Finding(math.nan, "not measured", None)
    share = float(case.equilibrium["fitted_samples"])
    zero, orthogonal = (statistics.mean(case.equilibrium[name]) for name in ("distributive_zero", "orthogonal"))
    text = f"{share:.1%} of the samples have |dL/df| < 1e-3 (mean {case.equilibrium['gradient_norm']:.3f})"
    if share < 1:
        text += f"; of the others' pairs with a stem weight, {zero:.1%} have no response, "
        text += f"{orthogonal:.1%} an orthogonal one"
    return Finding(share, text, share <= 0.1)


def hessian_elsewhere(_case: Case) -> Finding:
    """The Hessian of a classifier is not computed here."""
    return Finding(math.nan, "tested by python -m experiments hessian, and on the toys", None)


def sum_classifies(case: Case) -> Finding:
    """Classes whose mean logit of the sum is the largest."""
    present = case.labels.unique()
    columns = analysis.class_summary(case.outputs, case.labels).sum(0)[:, present]
    right = int((columns.argmax(0) == present).sum())
    return Finding(right, f"{right} of {len(present)} classes", right == len(present))


def top_count(labels: Tensor, label: int, share: float) -> int:
    """Number of a class's samples in a gallery: a share of them, at least five where there are."""
    available = int((labels == label).sum())
    return min(available, max(5, round(share * available)))


CRITERIA = (
    Criterion(
        "Fig. 6",
        1,
        "Branches come to serve fewer classes: the mean selectivity, weighted by energy, rises in training.",
        specialized,
    ),
    Criterion("Fig. 6", 2, "Branches work together: the sum is right more often than any branch alone.", collaborates),
    Criterion("Fig. 5 left", 3, "More branches classify better: accuracy(16) > accuracy(2).", more_is_better, (2, 16)),
    Criterion(
        "Fig. 5 middle",
        4,
        "Training makes the covariance of the branches more diagonal: mean |off-diagonal| / mean diagonal falls.",
        less_correlated,
    ),
    Criterion(
        "Fig. 5 left",
        5,
        "More branches means more silent ones: silent(32) > silent(16) ≥ silent(8).",
        silent_grow,
        (8, 16, 32),
    ),
    Criterion(
        "Fig. 5 left",
        5,
        "The number of active branches hardly grows: active(32) ≤ 1.5 active(16).",
        active_constant,
        (16, 32),
    ),
    Criterion(
        "Fig. 6",
        5,
        "Some branches are silent (response norm below 10 % of the largest) at M=16 or 32.",
        some_silent,
    ),
    Criterion("Fig. 5 right", 6, "The Hessian of the first layer becomes nearly block-diagonal.", hessian_elsewhere),
    Criterion(
        "Fig. 7",
        7,
        "Branches tell classes apart: for at least 2 pairs (branch, class) the mean confidence is over 2 pooled "
        "deviations from that of another class.",
        inter_class,
    ),
    Criterion(
        "Fig. 7",
        8,
        "Within a class branches disagree: in at least 3 classes two active ones have rank correlation below 0.5.",
        intra_class,
    ),
    Criterion(
        "Fig. 8",
        8,
        "The two most informative branches prefer different samples of a class: at most 30 % of the top 2 % in common "
        "and rank correlation below 0.5, in each class shown.",
        tops_differ,
    ),
    Criterion(
        "Fig. 6",
        None,
        "Branches differ much in strength: the largest response norm is at least twice the median.",
        strengths_differ,
    ),
    Criterion(
        "Fig. 6",
        None,
        "The sum classifies: for every true class the largest mean logit is its own.",
        sum_classifies,
    ),
    Criterion(
        "Sec. 8",
        None,
        "Only for a small subset of the samples, here at most 10 %, the factor that branches share, dL/df, vanishes.",
        few_fitted,
    ),
)


def _mean_selectivity(outputs: Tensor, labels: Tensor) -> float:
    energy = analysis.region_energy(outputs, labels, num_regions=outputs.shape[2])
    weights = energy.sum(1) / energy.sum()
    return (weights * analysis.selectivity(energy).nan_to_num(0)).sum().item()


def _listed(counts: Mapping[int, tuple[int, int]], which: int, word: str) -> str:
    return "; ".join(f"M={size}: {counts[size][which]} {word}" for size in sorted(counts))
