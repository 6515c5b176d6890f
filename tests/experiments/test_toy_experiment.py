"""The toy experiment at a small scale: its measures on small cases, and that every figure and claim is recorded."""

import numpy as np
import pytest

from experiments.common.record import Run
from experiments.toy import measure
from experiments.toy.run import run


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


@pytest.mark.parametrize(("branches", "unknown"), [([2, 6, 8, 10, 30], 0), ([2, 3], 7)])
def test_run_records_figures_and_claims(tmp_path, branches, unknown):
    record = Run("toy", {"seed": 1}, root=tmp_path)
    run(record, seed=1, trials=60, branches=branches, searched=200)
    names = {figure["name"] for figure in record.figures}
    assert {"figure-1", "figure-2", "figure-3-left", "figure-3-right", "figure-4-left", "figure-4-right"} <= names
    assert all((record.folder / figure["file"]).stat().st_size > 5000 for figure in record.figures)
    verdicts = [claim["holds"] for claim in record.claims]
    assert (len(verdicts), verdicts.count(None)) == (12, unknown)


def test_run_is_the_same_for_one_seed(tmp_path):
    records = [Run("toy", {"seed": 0}, root=tmp_path) for _ in range(2)]
    for record in records:
        run(record, seed=0, trials=20, branches=[2, 10], searched=50)
    assert records[0].metrics == records[1].metrics
    assert records[0].claims == records[1].claims
