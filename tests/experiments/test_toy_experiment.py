"""The toy experiment at a small scale: its measures on small cases, and that every figure and claim is recorded."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.common.record import Run
from experiments.toy import measure
from experiments.toy.claims import CRITERIA, judge
from experiments.toy.outcome import TOYS, Sweep, measure_seed
from experiments.toy.run import run

SMALL = {"trials": 20, "branches": [2, 10], "searched": 50}


@pytest.fixture(scope="module")
def outcomes():
    return [measure_seed(seed, **SMALL) for seed in (3, 4)]


def claim_of(record, observation):
    (claim,) = [claim for claim in record.claims if claim["observation"] == observation]
    return claim


def test_active_branches_counts_from_a_tenth_of_the_largest():
    responses = np.array([[[3.0, 4.0], [0.3, 0.4], [0.3, 0.39]], np.zeros((3, 2))])
    np.testing.assert_array_equal(measure.active_branches(responses), [[True, True, False], [False] * 3])


def test_offdiag_ratio_of_a_hand_made_matrix():
    covariances = np.array([[[2.0, -1.0], [-1.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    np.testing.assert_allclose(measure.offdiag_ratio(covariances), [1 / 3, 1])
    F = np.arange(12.0).reshape(1, 3, 4)
    np.testing.assert_allclose(measure.covariance(F)[0], F[0] @ F[0].T)


def test_stories_of_two_branches():
    each = [[1.0, 0.5, 0.0], [0.0, 0.01, 1.0]]
    sharing = [[1.0, 0.2, 0.0], [0.0, 0.3, 1.0]]
    ends = np.array([each, sharing, sharing])
    early = np.zeros((3, 6, 2, 3))
    early[2, 3, 1, 2] = 0.1  # not inactive at first
    np.testing.assert_array_equal(measure.one_branch_each(ends), [True, False, False])
    np.testing.assert_array_equal(measure.late_and_shared(early, ends, last=2, shared=1), [False, True, False])


@pytest.mark.parametrize("slope", [0.01, 0.3])
@pytest.mark.parametrize("name", TOYS)
def test_hessian_measures_equal_autograd(name, slope):
    M = 4
    x, y = (torch.tensor(values, dtype=torch.float64) for values in TOYS[name])
    theta = torch.rand(2, M, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    chosen = np.array([[True, False, True, True], [True, False, False, False]])

    def responses(own):
        return torch.nn.functional.leaky_relu(own[:, :1] * x + own[:, 1:], slope)

    def loss(flat):
        return 0.5 * (responses(flat.view(M, 2)).sum(0) - y).square().sum()

    norms = []
    for own in theta:
        hessian = torch.autograd.functional.hessian(loss, own.flatten()).view(M, 2, M, 2)
        norms.append([[hessian[k, :, l].norm().item() for l in range(M)] for k in range(M)])  # noqa: E741
    norms = np.array(norms)
    measured = measure.hessian_block_norms(torch.stack([responses(own) for own in theta]).numpy(), x.numpy(), slope)
    np.testing.assert_allclose(measured, norms, rtol=1e-12)
    diagonality = [sum(own[k, k] ** 2 for k in range(M)) / (own**2).sum() for own in norms]
    np.testing.assert_allclose(measure.block_diagonality(measured), diagonality, rtol=1e-12)
    pairs = [norms[0, k, l] / np.sqrt(norms[0, k, k] * norms[0, l, l]) for k, l in ((0, 2), (0, 3), (2, 3))]  # noqa: E741
    np.testing.assert_allclose(measure.coherence(measured, chosen), [np.mean(pairs), np.nan], rtol=1e-12)


def test_equilibrium_of_hand_made_networks():
    x, y = np.array([-1.0, 0.0, 1.0]), np.array([1.0, 0.5, 1.0])
    responses = np.array([[[1.0, 0.5, -1e-4], [-1e-4, -1e-4, 1.1]]])
    shares = measure.equilibrium(responses, x, y, 1e-4)
    assert shares == {"distributive_zero": [1 / 2], "negative": [1 / 2], "fitted_samples": [2 / 3]}
    assert measure.equilibrium(responses, x, y, 0.01)["distributive_zero"] == [0]
    far = measure.equilibrium(np.ones((1, 1, 2)), np.array([0.0, 2000.0]), np.ones(2), 0.01)
    assert far == {"distributive_zero": [1 / 2], "negative": [0], "fitted_samples": [1]}


def test_sweep_tells_values_and_slopes_or_nan():
    M = np.array([2.0, 6.0, 8.0, 9.0])
    known = Sweep(M, M / 10, np.array([9.0, 1.0, 2.0, np.nan]), M, M, M)
    assert (known.at("success", 6), known.slope("active")) == (0.6, pytest.approx(0.5))
    assert np.isnan(known.at("success", 7))
    assert np.isnan(Sweep(*[M[:2]] * 6).slope("active"))


@pytest.mark.parametrize(("branches", "unknown"), [([2, 6, 8, 10, 30], 0), ([2, 3], 7)])
def test_run_records_figures_and_claims(tmp_path, branches, unknown):
    record = Run("toy", {"seed": 1}, root=tmp_path)
    run(record, seed=1, seeds=2, trials=60, branches=branches, searched=200)
    names = ["figure-1", "figure-2", "figure-3-left", "figure-3-right", "figure-4-left", "figure-4-right"]
    assert [figure["name"] for figure in record.figures] == [*names, "toys-both-rates"]
    assert all((record.folder / figure["file"]).stat().st_size > 5000 for figure in record.figures)
    for figure in record.figures[1:]:
        assert all(words in figure["note"].lower() for words in ("seed 1;", "x = -1", "20,000 steps")), figure["name"]
    verdicts = [claim["verdict"] for claim in record.claims]
    assert (len(verdicts), verdicts.count("not tested")) == (14, unknown)
    assert {claim["observation"] for claim in record.claims} == {1, 2, 3, 4, 5, 6, None}


def test_run_redraws_every_figure_without_torch(tmp_path):
    record = Run("toy", {"seed": 0}, root=tmp_path)
    run(record, seeds=1, **SMALL)
    drawn = {path.name: path.read_bytes() for path in record.folder.glob("*.png")}
    assert len(drawn) == len(record.figures)
    for name in drawn:
        (record.folder / name).unlink()
    code = (
        "import sys; from experiments.common.record import Run; Run.load(sys.argv[1]).redraw(); "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(record.folder.resolve())], cwd=root, check=True)
    assert {path.name: path.read_bytes() for path in record.folder.glob("*.png")} == drawn


def test_run_judges_every_seed_and_draws_the_first(tmp_path):
    one, two = (Run("toy", {"seed": 3}, root=tmp_path) for _ in range(2))
    run(one, seed=3, seeds=1, **SMALL)
    run(two, seed=3, seeds=2, **SMALL)
    assert two.metrics == one.metrics
    assert (two.folder / "figure-2.json").read_bytes() == (one.folder / "figure-2.json").read_bytes()
    assert "over 2 seeds" in claim_of(two, 1)["measured"]
    assert "seeds" not in claim_of(one, 1)["measured"]


def test_judge_over_seeds(outcomes, tmp_path):
    first = replace(outcomes[0], shares={"A": 0.5, "B": 0.1})
    verdicts = {}
    for name, shares in {"second seed fails": (0.1, 0.3), "second seed has no trial": (np.nan, np.nan)}.items():
        record = Run("toy", {}, root=tmp_path)
        judge(record, [first, replace(outcomes[1], shares=dict(zip("AB", shares, strict=True)))])
        verdicts[name] = claim_of(record, 1)
    assert verdicts["second seed fails"]["verdict"] == "mixed"
    assert verdicts["second seed fails"]["measured"] == (
        "A 0.3 ± 0.28, B 0.2 ± 0.14 (mean ± standard deviation over 2 seeds; met with 1 of 2; first seed: 0.5, 0.1)"
    )
    assert verdicts["second seed has no trial"]["verdict"] == "holds"
    assert "A 0.5 ± 0, B 0.1 ± 0 (" in verdicts["second seed has no trial"]["measured"]


def test_measure_seed_depends_on_the_seed_alone(outcomes):
    first, second = outcomes
    again = measure_seed(4, **SMALL)
    for criterion in CRITERIA:
        np.testing.assert_equal(criterion.measure(again), criterion.measure(second))
    assert first.successful != second.successful
    assert first.correlation != second.correlation
    for name in TOYS:
        assert first.equilibrium[name] != second.equilibrium[name]
    for key, sweep in first.sweeps.items():
        assert (sweep.steps != second.sweeps[key].steps).any()
