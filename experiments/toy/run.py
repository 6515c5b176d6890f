"""Figures 1 to 4: train the toys from every seed, draw the first one's, and judge the paper's claims on all."""

from __future__ import annotations

from collections.abc import Sequence

from bsfast import plotting
from experiments.common.record import Run
from experiments.toy import figures
from experiments.toy.claims import judge
from experiments.toy.outcome import LR, MAX_STEPS, SLOPE, TOLERANCE, TOYS, Outcome, measure_seed

_BUDGET = (
    f"slope {SLOPE}, start U(-1, 1), loss summed over the 4 samples, success: squared error < {TOLERANCE:.0e} within "
    f"{MAX_STEPS:,} steps"
)


def run(
    record: Run,
    *,
    seed: int = 0,
    seeds: int = 5,
    trials: int = 1000,
    branches: Sequence[int] = range(2, 31),
    searched: int = 2000,
) -> None:
    """Draw Figures 1 to 4 and judge their claims.

    Args:
        record: Where figures, metrics and claims go.
        seed: Seed of the random starts of figures and metrics.
        seeds: Number of seeds, from that one, for each of which the claims are judged.
        trials: Random starts for each M.
        branches: Values of M of the sweeps, rising.
        searched: Random starts among which the two panels of Figure 2 are found.
    """
    outcomes = [
        measure_seed(own, trials=trials, branches=branches, searched=searched) for own in range(seed, seed + seeds)
    ]
    draw(record, outcomes[0])
    record_metrics(record, outcomes[0])
    judge(record, outcomes)


def draw(record: Run, outcome: Outcome) -> None:
    """Draw the figures of one seed; one that needs a trial which did not occur is left out."""
    record.figure("figure-1", figures.schematic, {}, "Figure 1: a branched network", "Drawn, no data.")
    if outcome.paths:
        x, y = TOYS["Toy1"]
        shares = ", ".join(f"{name} {share:.3f}" for name, share in outcome.shares.items())
        record.figure(
            "figure-2",
            figures.dynamics,
            {"paths": [path for _, path in outcome.paths.values()], "x": x, "y": y, "names": list(outcome.paths)},
            "Figure 2: dynamics of two branches on Toy1",
            f"Of each story the trial with the median number of steps: trials "
            f"{', '.join(str(trial) for trial, _ in outcome.paths.values())} of {outcome.searched}, of which "
            f"{outcome.successful} succeeded; shares of these: {shares}. {_note('Toy1', outcome)} M=2.",
        )
    each = f"{outcome.trials} starts for each M."
    sweep = outcome.sweeps["Toy1", LR["Toy1"]]
    record.figure(
        "figure-3-left",
        figures.success,
        {"branches": sweep.branches, "rate": sweep.success, "trials": outcome.trials},
        "Figure 3, left: success of Toy1 against M",
        f"{each} {_note('Toy1', outcome)}",
    )
    if outcome.covariances:
        record.figure(
            "figure-3-right",
            plotting.covariance_figure,
            {
                "matrices": list(outcome.covariances.values()),
                "titles": [f"trial {trial}" for trial in outcome.covariances],
            },
            "Figure 3, right: covariances of 10 branches on Toy1, ten trials",
            f"F Fᵀ, un-centred, of the first ten successful trials of {outcome.trials}. {_note('Toy1', outcome)}",
        )
    if outcome.example is not None:
        x, y = TOYS["Toy2"]
        trial, network = outcome.example
        record.figure(
            "figure-4-left",
            figures.example,
            {**network, "slope": SLOPE, "x": x, "y": y},
            "Figure 4, left and middle: 20 branches on Toy2, 3 of them active",
            f"Trial {trial} of {outcome.trials}, the first with exactly 3 active branches. {_note('Toy2', outcome)}",
        )
    sweep = outcome.sweeps["Toy2", LR["Toy2"]]
    record.figure(
        "figure-4-right",
        figures.counts,
        {"branches": sweep.branches, "active": sweep.active, "active_all": sweep.active_all},
        "Figure 4, right: active and silent branches of Toy2",
        f"{each} {_note('Toy2', outcome)}",
    )
    record.figure(
        "toys-both-rates",
        figures.both_rates,
        {
            "branches": sweep.branches,
            "sweeps": [
                {"toy": name, "lr": lr, "success": own.success, "active": own.active}
                for (name, lr), own in outcome.sweeps.items()
            ],
        },
        "Both toys at both learning rates",
        f"{each} {_data('Toy1')}; {_data('Toy2')}. Seed {outcome.seed}; {_BUDGET}.",
    )


def record_metrics(record: Run, outcome: Outcome) -> None:
    """Record the numbers of one seed."""
    for (name, lr), sweep in outcome.sweeps.items():
        record.metric(f"{name} lr {lr}", vars(sweep))
    record.metric(
        "Figure 2",
        {
            "searched": outcome.searched,
            "successful": outcome.successful,
            "shares of successful": outcome.shares,
        },
    )
    record.metric("Figure 3 off-diagonal ratio", outcome.correlation._asdict())
    record.metric("Figure 4 share with exactly 3 of 20 active", outcome.three_active)
    record.metric("Toy1, M=10: block-diagonality of the Hessian", outcome.block_diagonality._asdict())
    record.metric("Toy1, M=10: coherence of all pairs of branches", outcome.coherence._asdict())
    record.metric("Toy1, M=10: coherence of active pairs of branches", outcome.coherence_active._asdict())
    record.metric("equilibrium, Toy1 with M=10 and Toy2 with M=20", outcome.equilibrium)


def _note(name: str, outcome: Outcome) -> str:
    return f"{_data(name)}. Learning rate {LR[name]}, seed {outcome.seed}; {_BUDGET}."


def _data(name: str) -> str:
    x, y = (", ".join(f"{value:g}" for value in values) for values in TOYS[name])
    return f"{name}: x = {x}; y = {y}"
