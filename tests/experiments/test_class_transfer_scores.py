"""Scores of parts against layers, where they are known; baselines that sum to what they split."""

import itertools
import math

import numpy as np
import pytest
import torch

from experiments.class_transfer import scores
from experiments.class_transfer.baselines import independent_parts, laplacian_bands, principal_parts
from experiments.common.gaussian import gaussian_smooth


def noise(*shape):
    return torch.randn(*shape, 5, 3, 8, 8)


def test_correlations_equal_numpy():
    v, layers = noise(3), noise(2) + 1.0
    expected = np.corrcoef(v.flatten(1).numpy(), layers.flatten(1).numpy())[:3, 3:]
    np.testing.assert_allclose(scores.correlations(v, layers).numpy(), np.abs(expected), rtol=1e-5)


def test_matched_mean_equals_the_best_of_all_matchings():
    table = torch.rand(4, 3, dtype=torch.float64)
    best = max(
        np.mean([table[row, column] for column, row in enumerate(rows)]) for rows in itertools.permutations(range(4), 3)
    )
    assert scores.matched_mean(table) == pytest.approx(best)


def test_matched_null_is_that_of_other_images():
    layers = noise(2)
    v = layers.flip(0) * torch.tensor([2.0, -1.0]).view(2, 1, 1, 1, 1)
    matched, null = scores.matched_mean(scores.correlations(v, layers)), scores.matched_null(v, layers, draws=20)
    assert matched == pytest.approx(1, abs=1e-6)
    assert scores.p_value(matched, null) <= 2 / 21  # the order of 5 images that changes nothing may be drawn
    assert scores.p_value(null.min().item(), null) == 1
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(5, generator=generator)
    assert null[0].item() == pytest.approx(scores.matched_mean(scores.correlations(v, layers[:, order])))


def test_grouped_si_sdr_adds_the_parts_of_a_layer():
    layers = noise(2)
    halves = torch.stack([layers[0] / 2, 3 * layers[1], layers[0] / 2])
    assert scores.grouped_si_sdr(halves, layers) > 100
    layers = torch.zeros(2, 1, 3, 4, 4)
    layers[0, :, :, 0], layers[1, :, :, 1] = 1.0, 1.0
    disturbed = layers + 0.1 * layers.flip(0)
    assert scores.grouped_si_sdr(disturbed, layers) == pytest.approx(20, abs=1e-3)  # a tenth of the amplitude


def test_lift_is_the_inverse_area_of_the_mask_that_a_part_keeps_to():
    masks = torch.zeros(3, 5, 8, 8, dtype=torch.bool)
    masks[0, :, :2], masks[1, :, 4:] = True, True  # a quarter, a half, nothing
    v = noise(2) * masks[:2, :, None]
    assert scores.lift(v, masks) == pytest.approx((4 + 2) / 2)
    assert scores.lift(torch.ones(1, 5, 3, 8, 8), masks) == pytest.approx(1)


def test_responses_and_preference_find_the_part_that_answers():
    v = noise(3)
    without = [v.clone() for _ in range(2)]
    without[0][1] *= 0.5
    without[1][2] = 0
    changes = scores.responses(v, without)
    expected = torch.zeros(3, 2, 5, dtype=torch.float64)
    expected[1, 0], expected[2, 1] = 0.5, 1.0
    torch.testing.assert_close(changes, expected, atol=1e-6, rtol=0)
    assert scores.preference(changes) == pytest.approx(3)  # all of the response of three parts
    assert scores.preference(torch.ones(3, 2, 5, dtype=torch.float64)) == pytest.approx(1)
    null = scores.preference_null(changes, draws=50)
    assert null.max() < 3
    assert null.min() >= 1 - 1e-9


def test_redundancy_counts_directions():
    one = noise(1)
    same = scores.redundancy(torch.cat([one, -2 * one, 0.01 * one]))
    assert same == pytest.approx({"cosine": 1, "rank": 1, "active": 2}, abs=1e-6)
    rows = torch.eye(4).view(4, 1, 1, 2, 2)
    assert scores.redundancy(rows) == pytest.approx({"cosine": 0, "rank": 4, "active": 4})


def test_laplacian_bands_sum_to_what_the_gaussian_leaves():
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for count in (1, 4):
        bands = laplacian_bands(count, 2.0)(x)
        assert bands.shape == (count, 2, 3, 32, 32)
        torch.testing.assert_close(bands.sum(0), x - gaussian_smooth(x, 2.0))


@pytest.mark.parametrize("make", [principal_parts, independent_parts])
def test_linear_parts_find_the_directions_of_the_images(make):
    directions = torch.randn(2, 3 * 8 * 8, dtype=torch.float64)
    amounts = torch.rand(2, 60, 2, dtype=torch.float64) * 2 - 1
    train, x = ((own @ directions).view(-1, 3, 8, 8) for own in amounts)
    smooth = torch.zeros_like
    parts = make(train, 2, smooth)(x)
    assert parts.shape == (2, 60, 3, 8, 8)
    mean = train.mean(0)
    torch.testing.assert_close(parts.sum(0), x - mean, atol=1e-6, rtol=0)
    if make is independent_parts:
        sources = (amounts[1] - amounts[1].mean(0)).T[:, :, None] * directions[:, None]
        assert scores.matched_mean(scores.correlations(parts, sources.view_as(parts))) > 0.95


def test_p_value_counts_the_value_itself():
    assert scores.p_value(2.0, torch.tensor([1.0, 2.0, 3.0])) == 0.75
    assert math.isclose(scores.p_value(9.0, torch.zeros(199)), 0.005)
