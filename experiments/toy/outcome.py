"""What one seed of the toys gives: train from its random starts, and keep the numbers that are drawn and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bsfast import toy
from experiments.toy import measure
from experiments.toy.measure import Array, Mask

TOYS = {
    "Toy1": ([-1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.5, 1.0]),
    "Toy2": ([-1.0, 0.0, 1.0, 2.0], [1.0, 0.25, 0.5, 0.75]),
}
LR = {"Toy1": 0.01, "Toy2": 0.05}  # of the figures; the sweeps have both toys at both
SLOPE = 0.01
TOLERANCE = 1e-4
MAX_STEPS = 20_000
_EARLY_STEPS = 5  # for which both branches of story B are inactive
_FAR = 6  # M from which the paper calls the active count constant


class Change(NamedTuple):
    """A mean over successful trials, before and after training."""

    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Sweep:
    """Outcomes of one toy at one learning rate against M; each array is ``(len(branches),)``.

    Attributes:
        branches: Values of M.
        success: Share of successful trials.
        active: Active branches, mean over successful trials; NaN without one.
        active_all: Active branches, mean over all trials.
        diverged: Number of diverged trials.
        steps: Median over successful trials.
    """

    branches: Array
    success: Array
    active: Array
    active_all: Array
    diverged: Array
    steps: Array

    def at(self, name: str, M: int) -> float:
        """Value of an attribute at M; NaN if it was not run."""
        return float(np.append(getattr(self, name)[self.branches == M], np.nan)[0])

    def slope(self, name: str) -> float:
        """Least-squares slope of an attribute over M of 6 or more; NaN with fewer than two of these."""
        values = getattr(self, name)
        known = (self.branches >= _FAR) & np.isfinite(values)
        return float(np.polyfit(self.branches[known], values[known], 1)[0]) if known.sum() > 1 else np.nan


@dataclass(frozen=True, eq=False)
class Outcome:
    """All that one seed gave.

    Attributes:
        seed: Seed of the random starts.
        trials: Random starts for each M.
        sweeps: Toy and learning rate to its sweep.
        searched: Random starts of Figure 2.
        successful: How many of them succeeded.
        shares: Story of Figure 2 to its share of these; NaN without any.
        paths: Story to its trial with the median number of steps, and the responses at every step, ``(steps + 1, 2,
            J)``; without a story of which there is no trial.
        covariances: Trial to F Fᵀ, ``(M, M)``: the first ten successful trials of Toy1, M=10.
        correlation: Off-diagonal ratio of all of them.
        block_diagonality: Of their Hessians.
        coherence: Of their Hessians, over all pairs of branches.
        coherence_active: The same over pairs of active branches.
        three_active: Share with exactly 3 active branches of the successful trials of Toy2, M=20.
        example: The first of these, with ``weight``, ``bias`` and ``active``, each ``(M,)``; None if there is none.
        equilibrium: Toy to the shares of section 8, of the successful trials of Toy1, M=10, and Toy2, M=20.
    """

    seed: int
    trials: int
    sweeps: dict[tuple[str, float], Sweep]
    searched: int
    successful: int
    shares: dict[str, float]
    paths: dict[str, tuple[int, Array]]
    covariances: dict[int, Array]
    correlation: Change
    block_diagonality: Change
    coherence: Change
    coherence_active: Change
    three_active: float
    example: tuple[int, dict[str, Array | Mask]] | None
    equilibrium: dict[str, dict[str, float]]


def measure_seed(seed: int, *, trials: int, branches: Sequence[int], searched: int) -> Outcome:
    """Train all that the figures need from one seed.

    Args:
        seed: Seed of the random starts.
        trials: Random starts for each M.
        branches: Values of M of the sweeps, rising.
        searched: Random starts among which the two panels of Figure 2 are found.

    Returns:
        The numbers.
    """
    two = train("Toy1", 2, searched, seed)
    stories = find_stories(two)
    successful = int(two.success.sum())
    ten = train("Toy1", 10, trials, seed)
    twenty = train("Toy2", 20, trials, seed)
    active = measure.active_branches(twenty.responses)
    three = twenty.success & (active.sum(axis=1) == 3)
    return Outcome(
        seed=seed,
        trials=trials,
        sweeps={(name, lr): sweep(name, lr, branches, trials, seed) for name in TOYS for lr in sorted(LR.values())},
        searched=searched,
        successful=successful,
        shares={name: story.sum() / successful if successful else np.nan for name, story in stories.items()},
        paths={name: _follow(two, story) for name, story in stories.items() if story.any()},
        covariances={int(t): measure.covariance(ten.responses[t, None])[0] for t in np.flatnonzero(ten.success)[:10]},
        correlation=_change(ten, lambda responses: measure.offdiag_ratio(measure.covariance(responses))),
        block_diagonality=_change(ten, lambda responses: measure.block_diagonality(_block_norms(responses))),
        coherence=_change(ten, lambda responses: measure.coherence(_block_norms(responses), _everyone(responses))),
        coherence_active=_change(
            ten, lambda responses: measure.coherence(_block_norms(responses), measure.active_branches(responses))
        ),
        three_active=_mean(three[twenty.success]),
        example=_example(twenty, active, int(three.argmax())) if three.any() else None,
        equilibrium={"Toy1": _equilibrium("Toy1", ten), "Toy2": _equilibrium("Toy2", twenty)},
    )


def train(name: str, num_branches: int, trials: int, seed: int, lr: float | None = None) -> toy.Trials:
    """Train one toy, by default at the learning rate of its figures."""
    return toy.train(*TOYS[name], num_branches, trials, lr or LR[name], SLOPE, MAX_STEPS, seed, tolerance=TOLERANCE)


def sweep(name: str, lr: float, branches: Sequence[int], trials: int, seed: int) -> Sweep:
    """Train ``trials`` networks for each M and summarise them."""
    rows = []
    for M in branches:
        result = train(name, M, trials, seed, lr)
        active = measure.active_branches(np.nan_to_num(result.responses)).sum(axis=1)
        good = result.success
        steps = np.median(result.steps[good]) if good.any() else np.nan
        rows.append((M, good.mean(), _mean(active[good]), active.mean(), result.diverged.sum(), steps))
    return Sweep(*np.array(rows, dtype=np.float64).T)


def find_stories(two: toy.Trials) -> dict[str, Mask]:
    """Tell which trials of two branches on Toy1 end as panel A of Figure 2, and which as panel B."""
    early = toy.train(
        *TOYS["Toy1"],
        2,
        len(two.success),
        LR["Toy1"],
        SLOPE,
        _EARLY_STEPS,
        init=(two.initial_weight, two.initial_bias),
        record_steps=1,
    ).trajectory
    return {
        "A": two.success & measure.one_branch_each(two.responses),
        "B": two.success & measure.late_and_shared(early, two.responses, last=3, shared=1),
    }


def _follow(two: toy.Trials, story: Mask) -> tuple[int, Array]:
    """Train the trial of a story that has the median number of steps again, and keep every step."""
    candidates = np.flatnonzero(story)
    t = int(candidates[np.argsort(two.steps[candidates], kind="stable")[len(candidates) // 2]])
    again = toy.train(
        *TOYS["Toy1"],
        2,
        1,
        LR["Toy1"],
        SLOPE,
        int(two.steps[t]),
        init=(two.initial_weight[t, None], two.initial_bias[t, None]),
        tolerance=TOLERANCE,
        record_steps=1,
    )
    return t, again.trajectory[0]


def _example(twenty: toy.Trials, active: Mask, t: int) -> tuple[int, dict[str, Array | Mask]]:
    return t, {"weight": twenty.weight[t], "bias": twenty.bias[t], "active": active[t]}


def _change(result: toy.Trials, of: Callable[[Array], Array]) -> Change:
    """Mean of a measure of responses over successful trials, before and after training."""
    good = result.success
    return Change(_mean(of(result.initial_responses[good])), _mean(of(result.responses[good])))


def _block_norms(responses: Array) -> Array:
    return measure.hessian_block_norms(responses, np.array(TOYS["Toy1"][0]), SLOPE)


def _everyone(responses: Array) -> Mask:
    return np.ones(responses.shape[:2], dtype=bool)


def _equilibrium(name: str, result: toy.Trials) -> dict[str, float]:
    x, y = map(np.array, TOYS[name])
    shares = measure.equilibrium(result.responses[result.success], x, y, SLOPE)
    return {share: _mean(values) for share, values in shares.items()}


def _mean(values: Array | Mask) -> float:
    """Mean of the finite values; NaN without one."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else np.nan
