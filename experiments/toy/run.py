"""Figures 1 to 4: train the toys, draw them, and judge the paper's claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bsfast import plotting, toy
from experiments.common.record import Run
from experiments.toy import figures, measure

TOYS = {
    "Toy1": ([-1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.5, 1.0]),
    "Toy2": ([-1.0, 0.0, 1.0, 2.0], [1.0, 0.25, 0.5, 0.75]),
}
LR = {"Toy1": 0.01, "Toy2": 0.05}  # of the figures; the sweep has both toys at both
TOLERANCE = 1e-4
BUDGET = "slope 0.01, start U(-1, 1), loss summed over the 4 samples, success: squared error < 1e-4 in 20,000 steps"


@dataclass(frozen=True)
class Sweep:
    """Outcomes of one toy at one learning rate against M; each array is ``(len(branches),)``."""

    branches: np.ndarray
    success: np.ndarray
    active: np.ndarray  # mean over successful trials
    active_all: np.ndarray  # mean over all trials
    diverged: np.ndarray
    steps: np.ndarray  # median over successful trials


def run(
    record: Run, *, seed: int = 0, trials: int = 1000, branches: Sequence[int] = range(2, 31), searched: int = 2000
) -> None:
    """Draw Figures 1 to 4 and judge their claims.

    Args:
        record: Where figures, metrics and claims go.
        seed: Seed of the random starts.
        trials: Random starts for each M.
        branches: Values of M of the sweeps, rising.
        searched: Random starts among which the two panels of Figure 2 are found.
    """
    record.figure("figure-1", figures.schematic(), "Figure 1: a branched network", "Drawn, no data.")
    dynamics(record, seed, searched)
    sweeps = {(name, lr): sweep(name, lr, branches, trials, seed) for name in TOYS for lr in sorted(set(LR.values()))}
    for (name, lr), result in sweeps.items():
        record.metric(f"{name} lr {lr}", {key: getattr(result, key) for key in Sweep.__dataclass_fields__})
    note = f"{trials} trials for each M, seed {seed}; {BUDGET}."
    success_rate(record, sweeps["Toy1", LR["Toy1"]], trials, f"{note} Learning rate {LR['Toy1']}.")
    covariances(record, seed, trials)
    example(record, seed, trials)
    counts(record, sweeps["Toy2", LR["Toy2"]], f"{note} Learning rate {LR['Toy2']}.")
    other_rates(record, sweeps["Toy1", LR["Toy2"]], sweeps["Toy2", LR["Toy1"]])
    record.figure("toys-both-rates", figures.both_rates(sweeps), "Both toys at both learning rates", note)


def sweep(name: str, lr: float, branches: Sequence[int], trials: int, seed: int) -> Sweep:
    """Train ``trials`` networks for each M and summarise them."""
    rows = []
    for M in branches:
        result = toy.train(*TOYS[name], M, trials, lr, seed=seed)
        active = measure.active_branches(np.nan_to_num(result.responses)).sum(axis=1)
        good = result.success
        means = (active[good].mean(), np.median(result.steps[good])) if good.any() else (np.nan, np.nan)
        rows.append((M, good.mean(), means[0], active.mean(), result.diverged.sum(), means[1]))
    return Sweep(*np.array(rows).T)


def dynamics(record: Run, seed: int, searched: int) -> None:
    """Figure 2: two ways in which two branches share Toy1."""
    x, y = TOYS["Toy1"]
    lr = LR["Toy1"]
    result = toy.train(x, y, 2, searched, lr, seed=seed)
    early = toy.train(x, y, 2, searched, lr, seed=seed, max_steps=5, record_steps=1).trajectory
    stories = {
        "A": result.success & measure.one_branch_each(result.responses),
        "B": result.success & measure.late_and_shared(early, result.responses, last=3, shared=1),
    }
    successes = int(result.success.sum())
    shares = {name: story.sum() / max(successes, 1) for name, story in stories.items()}
    record.metric("Figure 2", {"searched": searched, "successful": successes, "shares of successful": shares})
    measured = f"A {shares['A']:.3f}, B {shares['B']:.3f} of {successes} successful trials out of {searched}"
    record.claim(
        "Fig. 2",
        "One branch for each region (A) is common, a late take-over with sharing (B) is rarer: share of A > of B > 0",
        measured,
        bool(shares["A"] > shares["B"] > 0),
    )
    shown = [_median_trial(np.flatnonzero(story), result.steps) for story in stories.values() if story.any()]
    if not shown:
        return
    start = result.initial_weight[shown], result.initial_bias[shown]
    longest = int(result.steps[shown].max())
    again = toy.train(x, y, 2, len(shown), lr, init=start, max_steps=longest, record_steps=1)
    record.figure(
        "figure-2",
        figures.dynamics(again.trajectory, again.steps, x, y, [name for name in stories if stories[name].any()]),
        "Figure 2: dynamics of two branches on Toy1",
        f"Of each story the trial with the median number of steps (seed {seed}, trials "
        f"{', '.join(map(str, shown))}); {measured}. M=2, learning rate {lr}; {BUDGET}.",
    )
    worst = again.error.max()
    record.claim(
        "Fig. 2", "Both runs shown fit the data: squared error < 1e-4", f"{worst:.3e}", bool(worst < TOLERANCE)
    )


def success_rate(record: Run, result: Sweep, trials: int, note: str) -> None:
    """Figure 3, left."""
    M, s = result.branches, result.success
    record.figure("figure-3-left", figures.success(M, s, trials), "Figure 3, left: success of Toy1 against M", note)
    drop = s[:-1] - s[1:] - 3 * np.sqrt(2 * s[:-1] * (1 - s[:-1]) / trials) - 0.003
    at = int(drop.argmax())
    record.claim(
        "Fig. 3 left",
        "Success does not fall with M, but for binomial noise of 3 sigma + 0.003 between neighbours",
        f"the largest fall is {max((s[:-1] - s[1:]).max(), 0):.3f}; "
        f"nearest to the bound: {s[at]:.3f} at M={M[at]:.0f}, {s[at + 1]:.3f} at M={M[at + 1]:.0f}",
        bool((drop <= 0).all()),
    )
    many = s[M >= 10]
    record.claim(
        "Fig. 3 left",
        "Success is around 100% for M of 10 or more: at least 0.98",
        f"smallest {many.min():.3f}" if many.size else "no such M was run",
        bool((many >= 0.98).all()) if many.size else None,
    )
    two, ten = s[M == 2], s[M == 10]
    known = bool(two.size and ten.size)
    record.claim(
        "Fig. 3 left",
        "Few branches succeed less often: success(2) is at least 0.05 below success(10)",
        f"{two[0]:.3f} and {ten[0]:.3f}" if known else "these M were not run",
        bool(two[0] <= ten[0] - 0.05) if known else None,
    )


def covariances(record: Run, seed: int, trials: int) -> None:
    """Figure 3, right."""
    result = toy.train(*TOYS["Toy1"], 10, trials, LR["Toy1"], seed=seed)
    good = np.flatnonzero(result.success)
    before, after = (measure.covariance(responses[good]) for responses in (result.initial_responses, result.responses))
    first, last = measure.offdiag_ratio(before), measure.offdiag_ratio(after)
    record.metric("Figure 3 off-diagonal ratio", {"start": first.mean(), "end": last.mean()})
    record.figure(
        "figure-3-right",
        plotting.covariance_figure(after[:10], titles=[f"trial {t}" for t in good[:10]]),
        "Figure 3, right: covariances of 10 branches on Toy1, ten trials",
        f"F Fᵀ, un-centred, of the first ten successful trials, seed {seed}. Branches 1 to 10, learning rate "
        f"{LR['Toy1']}; {BUDGET}.",
    )
    record.claim(
        "Fig. 3 right",
        "Training makes branches less correlated: mean off-diagonal ratio below its start and below 0.35",
        f"{first.mean():.3f} at the start, {last.mean():.3f} at the end, mean of {len(good)} successful trials "
        f"({last[:10].mean():.3f} for the ten shown)",
        bool(last.mean() < min(first.mean(), 0.35)),
    )


def example(record: Run, seed: int, trials: int) -> None:
    """Figure 4, left and middle: twenty branches of which three are active."""
    x, y = TOYS["Toy2"]
    result = toy.train(x, y, 20, trials, LR["Toy2"], seed=seed)
    active = measure.active_branches(result.responses)
    found = np.flatnonzero(result.success & (active.sum(axis=1) == 3))
    share = len(found) / max(int(result.success.sum()), 1)
    record.claim(
        "Fig. 4 left",
        "A trained network of 20 branches has exactly 3 active ones",
        f"{len(found)} of {int(result.success.sum())} successful trials ({share:.3f})",
        bool(len(found)),
    )
    if not len(found):
        return
    t = int(found[0])
    line = np.linspace(-1.2, 2.2, 341)
    z = result.weight[t, :, None] * line + result.bias[t, :, None]
    curves = np.where(z > 0, z, 0.01 * z)
    record.figure(
        "figure-4-left",
        plotting.responses_figure(
            result.responses[t],
            x=line,
            curves=curves,
            total=curves.sum(axis=0),
            targets=(x, y),
            active=active[t],
            sample_names=[f"x={value:g}" for value in x],
        ),
        "Figure 4, left and middle: 20 branches on Toy2, 3 of them active",
        f"Trial {t} of seed {seed}, the first with exactly 3 active branches. Learning rate {LR['Toy2']}; {BUDGET}.",
    )


def counts(record: Run, result: Sweep, note: str) -> None:
    """Figure 4, right."""
    M, active = result.branches, result.active
    record.figure("figure-4-right", figures.counts(result), "Figure 4, right: active and silent branches of Toy2", note)
    far = M >= 6
    slopes = {}
    for name, values in (("successful", active), ("all", result.active_all)):
        if far.sum() > 1:
            slopes[name] = float(np.polyfit(M[far], values[far], 1)[0])
    known = bool(slopes)
    record.metric("Figure 4 slope of the active count", slopes)
    record.claim(
        "Fig. 4 right",
        "The number of active branches is almost constant: slope over M of 6 or more at most 0.15",
        f"{slopes['successful']:+.3f} (all trials {slopes['all']:+.3f})" if known else "these M were not run",
        slopes["successful"] <= 0.15 if known else None,
    )
    record.claim(
        "Fig. 4 right",
        "Silent branches grow linearly with M: slope over M of 6 or more at least 0.85",
        f"{1 - slopes['successful']:+.3f} (all trials {1 - slopes['all']:+.3f})" if known else "these M were not run",
        1 - slopes["successful"] >= 0.85 if known else None,
    )
    eight, thirty = active[M == 8], active[M == 30]
    known = bool(eight.size and thirty.size)
    record.claim(
        "Fig. 4 right",
        "Nearly four times the branches do not double the active ones: active(30) at most 2 active(8)",
        f"{thirty[0]:.2f} and {eight[0]:.2f}" if known else "these M were not run",
        bool(thirty[0] <= 2 * eight[0]) if known else None,
    )


def other_rates(record: Run, toy1: Sweep, toy2: Sweep) -> None:
    """Judge Figures 3 and 4 with their learning rates exchanged: what of them depends on the rate."""
    many = toy1.success[toy1.branches >= 10]
    record.claim(
        "Fig. 3 left",
        f"The same at learning rate {LR['Toy2']}: at least 0.98 for M of 10 or more",
        f"smallest {many.min():.3f}; with many branches the steps overshoot" if many.size else "no such M was run",
        bool((many >= 0.98).all()) if many.size else None,
    )
    far = toy2.branches >= 6
    known = bool(far.sum() > 1)
    slope = float(np.polyfit(toy2.branches[far], toy2.active[far], 1)[0]) if known else np.nan
    record.claim(
        "Fig. 4 right",
        f"The same at learning rate {LR['Toy1']}: slope of the active count at most 0.15",
        f"{slope:+.3f}: from {toy2.active[far][0]:.2f} to {toy2.active[far][-1]:.2f} active branches, still growing"
        if known
        else "these M were not run",
        slope <= 0.15 if known else None,
    )


def _median_trial(candidates: np.ndarray, steps: np.ndarray) -> int:
    """Pick the candidate with the median number of steps."""
    return int(candidates[np.argsort(steps[candidates], kind="stable")[len(candidates) // 2]])
