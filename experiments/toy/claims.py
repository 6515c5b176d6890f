"""Judge the paper's claims about the toys, Figures 2 to 4 and the Hessian, once for each seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.common.record import Run
from experiments.toy.outcome import LR, TOLERANCE, TOYS, Outcome

_MANY = 10  # branches from which success is around 100%


class Criterion(NamedTuple):
    """A claim of the paper with its criterion.

    Attributes:
        figure: Where the paper says it.
        observation: Number of the observation that it tests, or None.
        claim: The claim.
        measure: Numbers of one seed, by name; NaN for what was not run.
        holds: Tells from these numbers, in their order, whether the criterion is met.
    """

    figure: str
    observation: int | None
    claim: str
    measure: Callable[[Outcome], dict[str, float]]
    holds: Callable[..., bool]


def judge(record: Run, outcomes: Sequence[Outcome]) -> None:
    """Judge every criterion for every seed, and record it.

    Args:
        record: Gets the claims.
        outcomes: One a seed.
    """
    for criterion in CRITERIA:
        numbers = [criterion.measure(outcome) for outcome in outcomes]
        holds = [bool(criterion.holds(*own.values())) if _known(own) else None for own in numbers]
        record.claim(
            criterion.figure, criterion.claim, describe(numbers, holds), holds, observation=criterion.observation
        )


def describe(numbers: Sequence[dict[str, float]], holds: Sequence[bool | None]) -> str:
    """Put the numbers of all seeds, their means and standard deviations into words."""
    known = [own for own in numbers if _known(own)]
    if not known:
        return "not run"
    if len(numbers) == 1:
        return ", ".join(f"{name} {value:.4g}" for name, value in known[0].items())
    columns = {name: [own[name] for own in known] for name in known[0]}
    spread = (
        f"{name} {statistics.mean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"
        for name, values in columns.items()
    )
    first = ", ".join(f"{value:.4g}" for value in numbers[0].values())
    return (
        f"{', '.join(spread)} (mean ± standard deviation over {len(known)} seeds; met with {list(holds).count(True)} "
        f"of {len(holds)}; first seed: {first})"
    )


def worst_error(outcome: Outcome) -> dict[str, float]:
    """Largest squared error at the end of the runs of Figure 2."""
    y = np.array(TOYS["Toy1"][1])
    errors = [((path[-1].sum(axis=0) - y) ** 2).sum() for _, path in outcome.paths.values()]
    return {"largest error": float(max(errors, default=math.nan))}


def falls(outcome: Outcome) -> dict[str, float]:
    """Largest fall of success from one M to the next, and the largest excess of one over its bound."""
    success = outcome.sweeps["Toy1", LR["Toy1"]].success
    if len(success) < 2:
        return {"largest fall": math.nan, "excess over the bound": math.nan}
    fall = success[:-1] - success[1:]
    bound = 3 * np.sqrt(2 * success[:-1] * (1 - success[:-1]) / outcome.trials) + 0.003
    return {"largest fall": max(fall.max(), 0.0), "excess over the bound": (fall - bound).max()}


def least_success(lr: float) -> Callable[[Outcome], dict[str, float]]:
    """Make the measure of Toy1's smallest success at M of 10 or more, at a learning rate."""

    def measure(outcome: Outcome) -> dict[str, float]:
        sweep = outcome.sweeps["Toy1", lr]
        return {"smallest": min(sweep.success[sweep.branches >= _MANY], default=math.nan)}

    return measure


def success_few_and_many(outcome: Outcome) -> dict[str, float]:
    """Toy1's success at M = 2 and 10."""
    return {f"M={M}": outcome.sweeps["Toy1", LR["Toy1"]].at("success", M) for M in (2, 10)}


def slope_of_active(lr: float) -> Callable[[Outcome], dict[str, float]]:
    """Make the measure of the slope of Toy2's active count, at a learning rate."""

    def measure(outcome: Outcome) -> dict[str, float]:
        sweep = outcome.sweeps["Toy2", lr]
        return {"successful trials": sweep.slope("active"), "all trials": sweep.slope("active_all")}

    return measure


def slope_of_silent(outcome: Outcome) -> dict[str, float]:
    """Slope of Toy2's silent count: what the active ones' lacks to 1."""
    return {name: 1 - slope for name, slope in slope_of_active(LR["Toy2"])(outcome).items()}


def active_eight_and_thirty(outcome: Outcome) -> dict[str, float]:
    """Toy2's active branches at M = 8 and 30."""
    return {f"M={M}": outcome.sweeps["Toy2", LR["Toy2"]].at("active", M) for M in (8, 30)}


def block_diagonality(outcome: Outcome) -> dict[str, float]:
    """Share of the squared Hessian in diagonal blocks, and the coherence of the blocks, which is not judged."""
    return {
        "start": outcome.block_diagonality.start,
        "end": outcome.block_diagonality.end,
        "mean coherence of all pairs at the start": outcome.coherence.start,
        "at the end": outcome.coherence.end,
        "of active pairs at the start": outcome.coherence_active.start,
        "of active pairs at the end": outcome.coherence_active.end,
    }


def _known(numbers: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in numbers.values())


CRITERIA = (
    Criterion(
        "Fig. 2",
        1,
        "One branch for each region (A) is more frequent than a late take-over with sharing (B): share of A > of B, "
        "of successful trials",
        lambda outcome: outcome.shares,
        lambda a, b: a > b,
    ),
    Criterion(
        "Fig. 2",
        2,
        "A branch that was idle takes a region over late, and both share another (B): share of B > 0",
        lambda outcome: {"B": outcome.shares["B"]},
        lambda b: b > 0,
    ),
    Criterion(
        "Fig. 2",
        None,
        f"The runs shown fit the data: squared error < {TOLERANCE:.0e}",
        worst_error,
        lambda error: error < TOLERANCE,
    ),
    Criterion(
        "Fig. 3 left",
        3,
        "Success does not fall with M, but for binomial noise of 3 sigma + 0.003 between neighbours",
        falls,
        lambda _, excess: excess <= 0,
    ),
    Criterion(
        "Fig. 3 left",
        3,
        "Success is around 100% for M of 10 or more: at least 0.98",
        least_success(LR["Toy1"]),
        lambda smallest: smallest >= 0.98,
    ),
    Criterion(
        "Fig. 3 left",
        3,
        "Few branches succeed less often: success(2) is at least 0.05 below success(10)",
        success_few_and_many,
        lambda two, ten: two <= ten - 0.05,
    ),
    Criterion(
        "Fig. 3 right",
        4,
        "Training makes branches less correlated: mean off-diagonal ratio below its start and below 0.35",
        lambda outcome: outcome.correlation._asdict(),
        lambda start, end: end < min(start, 0.35),
    ),
    Criterion(
        "Sec. 4, Toy1",
        6,
        "Training makes the Hessian more nearly block-diagonal: with M=10, the share of its squared norm that lies in "
        "the diagonal blocks rises",
        block_diagonality,
        lambda start, end, *_: end > start,
    ),
    Criterion(
        "Fig. 4 left",
        None,
        "A trained network of 20 branches has exactly 3 active ones",
        lambda outcome: {"share of successful trials": outcome.three_active},
        lambda share: share > 0,
    ),
    Criterion(
        "Fig. 4 right",
        5,
        "The number of active branches is almost constant: slope over M of 6 or more at most 0.15",
        slope_of_active(LR["Toy2"]),
        lambda slope, _: slope <= 0.15,
    ),
    Criterion(
        "Fig. 4 right",
        5,
        "Silent branches grow linearly with M: slope over M of 6 or more at least 0.85",
        slope_of_silent,
        lambda slope, _: slope >= 0.85,
    ),
    Criterion(
        "Fig. 4 right",
        5,
        "Nearly four times the branches do not double the active ones: active(30) at most 2 active(8)",
        active_eight_and_thirty,
        lambda eight, thirty: thirty <= 2 * eight,
    ),
    Criterion(
        "Fig. 3 left",
        None,
        f"The same at learning rate {LR['Toy2']}, where steps may overshoot: at least 0.98 for M of 10 or more",
        least_success(LR["Toy2"]),
        lambda smallest: smallest >= 0.98,
    ),
    Criterion(
        "Fig. 4 right",
        None,
        f"The same at learning rate {LR['Toy1']}: slope of the active count at most 0.15",
        slope_of_active(LR["Toy1"]),
        lambda slope, _: slope <= 0.15,
    ),
)
