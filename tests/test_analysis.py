"""bsfast.analysis against NumPy loops, closed forms and cases computed by hand."""

import math

import numpy as np
import pytest
import torch

from bsfast import analysis

DTYPES = [torch.float32, torch.float64]
# Sums here have at most 210 terms of order 1, so rounding stays below 210 eps.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 5e-14}


def branch_outputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Draw outputs of branches whose sizes differ; the seed depends on the shape only."""
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = torch.logspace(0, -2, shape[0], dtype=dtype).reshape(-1, *[1] * (len(shape) - 1))
    return sizes * torch.randn(shape, dtype=dtype, generator=generator)


def labels_of(num_samples: int, num_classes: int) -> torch.Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(1)) % num_classes


def assert_close(actual: torch.Tensor, expected: np.ndarray | list, dtype: torch.dtype = torch.float64) -> None:
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 4, 2), (7, 5, 3, 2, 2)])
def test_response_matrix_has_one_row_a_branch_samples_outermost(shape, dtype):
    outputs = branch_outputs(shape, dtype)
    expected = np.array([[value for sample in branch for value in np.ravel(sample)] for branch in outputs.numpy()])
    assert_close(analysis.response_matrix(outputs), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6), (2, 210), (9, 31)])
def test_covariance_is_sum_of_products(shape, dtype):
    rows = branch_outputs(shape, dtype)
    expected = [[sum(a * b for a, b in zip(k, j, strict=True)) for j in rows.tolist()] for k in rows.tolist()]
    assert_close(analysis.covariance(rows), expected, dtype)


def test_covariance_of_a_non_contiguous_matrix():
    rows = branch_outputs((12, 5)).T[:, ::2]
    assert not rows.is_contiguous()
    assert_close(analysis.covariance(rows), rows.numpy() @ rows.numpy().T)


def test_covariance_is_differentiable_and_leaves_its_input_alone():
    rows = branch_outputs((3, 4)).requires_grad_()
    before = rows.detach().clone()
    analysis.covariance(rows).diagonal().sum().backward()
    assert_close(rows.grad, 2 * before.numpy())
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosine_and_pearson_equal_numpy(dtype):
    rows = branch_outputs((6, 40), dtype)
    norms = np.linalg.norm(rows.numpy(), axis=1)
    assert_close(
        analysis.cosine(analysis.covariance(rows)), (rows.numpy() @ rows.numpy().T) / np.outer(norms, norms), dtype
    )
    assert_close(analysis.pearson(rows), np.corrcoef(rows.numpy().astype(np.float64)), dtype)


def test_cosine_of_identical_opposite_and_orthogonal_branches():
    rows = torch.tensor([[3.0, 4.0], [6.0, 8.0], [-3.0, -4.0], [-4.0, 3.0]])
    expected = [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]]
    assert_close(analysis.cosine(analysis.covariance(rows)), expected, torch.float32)


def test_cosine_is_nan_exactly_where_a_response_is_zero():
    cosine = analysis.cosine(analysis.covariance(torch.tensor([[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]])))
    expected = [[1, math.nan, 0.8], [math.nan] * 3, [0.8, math.nan, 1]]
    assert_close(cosine, expected, torch.float32)


def test_cosine_stays_in_its_range_and_ignores_scale():
    rows = branch_outputs((5, 30), torch.float32)
    scaled = rows * torch.tensor([1e-6, 1.0, 3.0, 1e6, 7.0])[:, None]
    cosine = analysis.cosine(analysis.covariance(scaled))
    assert cosine.abs().max() <= 1
    assert analysis.cosine(torch.diag(torch.arange(1.0, 100.0))).max() == 1  # 7 / sqrt(7) / sqrt(7) > 1
    assert_close(cosine, analysis.cosine(analysis.covariance(rows)).numpy(), torch.float32)


def test_pearson_ignores_shift_and_positive_scale():
    rows = branch_outputs((4, 50))
    moved = rows * torch.tensor([2.0, 0.5, 30.0, 1.0])[:, None] + torch.tensor([1.0, -2.0, 0.0, 5.0])[:, None]
    np.testing.assert_allclose(analysis.pearson(moved).numpy(), analysis.pearson(rows).numpy(), atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pearson_of_a_constant_row_is_nan_not_rounding_noise(dtype):
    # The mean of 0.1 over 77 entries is not exactly 0.1: naive centring leaves noise, and noise correlates.
    rows = torch.cat([torch.full((1, 77), 0.1, dtype=dtype), branch_outputs((1, 77), dtype)])
    assert analysis.pearson(rows).isnan().tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (16, 20), (5, 6, 2), (4, 3, 2, 3, 3)])
def test_active_branches_equal_a_loop_over_norms(shape, dtype):
    outputs = branch_outputs(shape, dtype)
    norms = [math.sqrt(sum(value**2 for value in branch.flatten().tolist())) for branch in outputs]
    assert analysis.active_branches(outputs).tolist() == [norm >= 0.1 * max(norms) for norm in norms]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_active_branches_ignore_scale(scale):
    outputs = branch_outputs((16, 20), torch.float32)
    active = analysis.active_branches(outputs)
    assert 0 < active.sum() < 16
    assert torch.equal(analysis.active_branches(outputs * scale), active)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.05, [1, 1, 1]), (0.1, [1, 1, 0]), (0.3, [1, 0, 0]), (1.0, [1, 0, 0])]
)
def test_active_branches_threshold(threshold, expected):
    rows = torch.diag(torch.tensor([-8.0, 2.0, 0.5]))
    assert analysis.active_branches(rows, threshold).tolist() == [bool(entry) for entry in expected]


def test_active_branches_count_the_threshold_itself():
    assert analysis.active_branches(torch.tensor([[4.0], [1.0]]), 0.25).tolist() == [True, True]


def test_active_branches_of_zero_responses_are_none():
    assert analysis.active_branches(torch.zeros(3, 4)).tolist() == [False] * 3
    assert analysis.active_branches(torch.zeros(1, 1)).tolist() == [False]


def test_active_branches_centred_silences_a_constant_of_each_class():
    varying = branch_outputs((1, 9, 3)) * torch.tensor(0.1)
    constant = torch.tensor([5.0, -3.0, 0.1], dtype=torch.float64).expand(1, 9, 3)
    outputs = torch.cat([varying, constant])
    assert analysis.active_branches(outputs).tolist() == [False, True]
    assert analysis.active_branches(outputs, centred=True).tolist() == [True, False]


def test_active_branches_centred_equals_a_loop():
    outputs = branch_outputs((12, 10, 4)) + torch.arange(4.0)
    norms = [np.linalg.norm(branch - branch.mean(axis=0, keepdims=True)) for branch in outputs.numpy()]
    expected = [norm >= 0.1 * max(norms) for norm in norms]
    assert 0 < sum(expected) < 12
    assert analysis.active_branches(outputs, centred=True).tolist() == expected


@pytest.mark.parametrize("num_branches", [2, 3, 17])
def test_offdiag_scores_of_orthogonal_and_identical_branches(num_branches):
    orthogonal = analysis.covariance(torch.diag(torch.arange(1.0, num_branches + 1)))
    identical = analysis.covariance(torch.tensor([1.0, -2.0, 3.0]).repeat(num_branches, 1))
    active = torch.ones(num_branches, dtype=torch.bool)
    assert analysis.offdiag_ratio(orthogonal) == analysis.offdiag_cosine(orthogonal, active) == 0
    assert analysis.offdiag_ratio(identical) == pytest.approx(1, rel=1e-6)
    assert analysis.offdiag_cosine(identical, active) == pytest.approx(1, rel=1e-6)


def test_offdiag_ratio_by_hand_and_free_of_scale():
    cov = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 4.0, 0.0], [0.5, 0.0, 6.0]])
    assert analysis.offdiag_ratio(cov) == pytest.approx((1 + 0.5 + 0) / 3 / 4)
    assert analysis.offdiag_ratio(1e3 * cov) == pytest.approx(analysis.offdiag_ratio(cov))


@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e38])
def test_offdiag_ratio_of_every_representable_covariance(size):
    # Of eight entries, the sum of 1e38 overflows in float32; 1e-44 is seven times the smallest number, 1e-40 denormal.
    assert analysis.offdiag_ratio(torch.full((8, 8), size)) == pytest.approx(1, rel=1e-6)


def test_offdiag_ratio_of_tiny_responses_in_float64():
    responses = torch.full((2, 3), 1e-25)  # squares: 1e-50, 0 in float32
    assert math.isnan(analysis.offdiag_ratio(analysis.covariance(responses)))
    assert analysis.offdiag_ratio(analysis.covariance(responses.double())) == pytest.approx(1)


def test_offdiag_cosine_sees_active_pairs_only():
    cov = torch.tensor([[4.0, -1.0, 0.2], [-1.0, 1.0, 0.1], [0.2, 0.1, 0.0]])
    assert analysis.offdiag_cosine(cov, torch.tensor([True, True, False])) == 0.5


def test_offdiag_scores_without_a_pair_are_nan():
    one, zero = torch.ones(1, 1), torch.zeros(3, 3)
    assert math.isnan(analysis.offdiag_ratio(one))
    assert math.isnan(analysis.offdiag_ratio(zero))
    assert math.isnan(analysis.offdiag_cosine(one, torch.tensor([True])))
    assert math.isnan(analysis.offdiag_cosine(torch.eye(3), torch.tensor([False, True, False])))
    assert math.isnan(analysis.offdiag_cosine(zero, torch.zeros(3, dtype=torch.bool)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_region_energy_of_classes_equals_a_loop(dtype):
    outputs, labels = branch_outputs((3, 14, 5), dtype), labels_of(14, 4)
    expected = np.zeros((3, 6))
    for branch in range(3):
        for sample, label in enumerate(labels.tolist()):
            expected[branch, label] += np.sum(outputs[branch, sample].numpy() ** 2)
    assert_close(analysis.region_energy(outputs, labels, num_regions=6), expected, dtype)
    assert analysis.region_energy(outputs, labels).shape == (3, 4)


def test_region_energy_of_pixels_equals_a_loop_and_keeps_the_total():
    outputs, regions = branch_outputs((2, 3, 2, 4, 5)), labels_of(60, 3).reshape(3, 4, 5)
    expected = np.zeros((2, 3))
    for branch, sample, channel, row, column in np.ndindex(*outputs.shape):
        expected[branch, regions[sample, row, column]] += outputs[branch, sample, channel, row, column].item() ** 2
    energy = analysis.region_energy(outputs, regions)
    assert_close(energy, expected)
    assert_close(energy.sum(1), outputs.square().flatten(1).sum(1).numpy())
    assert_close(analysis.region_energy(outputs.mT, regions.mT), expected)


def test_energy_shares_sum_to_one_and_are_nan_without_energy():
    energy = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert_close(analysis.energy_shares(energy), [[0.25, 0.75], [math.nan, math.nan]], torch.float32)


def test_selectivity_and_completeness_are_transposes_of_each_other():
    energy = branch_outputs((5, 3)).square()
    assert_close(analysis.completeness(energy), analysis.selectivity(energy.T).numpy())


def test_selectivity_in_closed_form():
    energy = torch.tensor([[0.0, 5.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [9, 3, 3, 1.0]])
    entropy = -sum(p * math.log(p, 4) for p in (9 / 16, 3 / 16, 3 / 16, 1 / 16))
    assert_close(analysis.selectivity(energy), [1, 0, 0.5, math.nan, 1 - entropy], torch.float32)
    assert_close(analysis.selectivity(1e4 * energy), analysis.selectivity(energy).numpy(), torch.float32)


def test_scores_of_one_branch_or_one_region_are_nan():
    assert analysis.completeness(torch.ones(1, 3)).isnan().all()
    assert analysis.selectivity(torch.ones(3, 1)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_branches", [1, 4])
def test_confidence_equals_a_loop(num_branches, dtype):
    outputs, labels = branch_outputs((num_branches, 11, 5), dtype), labels_of(11, 5)
    kinds = {
        "logit": lambda v, y: v[y],
        "centred": lambda v, y: v[y] - sum(v) / len(v),
        "margin": lambda v, y: v[y] - max(v[:y] + v[y + 1 :]),
    }
    for kind, formula in kinds.items():
        expected = [[formula(v, y) for v, y in zip(k, labels.tolist(), strict=True)] for k in outputs.tolist()]
        assert_close(analysis.confidence(outputs, labels, kind=kind), expected, dtype)


def test_confidence_of_centred_and_margin_kind_ignores_the_gauge():
    outputs, labels = branch_outputs((3, 8, 4)), labels_of(8, 4)
    shifted = outputs + branch_outputs((3, 8, 1))
    for kind in ("centred", "margin"):
        difference = analysis.confidence(shifted, labels, kind=kind) - analysis.confidence(outputs, labels, kind=kind)
        assert_close(difference, np.zeros((3, 8)))
    assert not torch.allclose(analysis.confidence(shifted, labels), analysis.confidence(outputs, labels))


def test_confidence_takes_any_integer_labels_and_strides():
    outputs, labels = branch_outputs((4, 5, 6)).permute(2, 1, 0), torch.tensor([3, 0, 1, 2, 2])
    expected = outputs.contiguous()[:, torch.arange(5), labels].numpy()
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert_close(analysis.confidence(outputs, labels.to(dtype)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_summary_equals_a_loop_and_is_nan_for_an_absent_class(dtype):
    outputs, labels = branch_outputs((3, 13, 4), dtype), labels_of(13, 3)
    expected = np.full((3, 4, 4), np.nan)
    for branch, logit, label in np.ndindex(3, 4, 3):
        members = [outputs[branch, j, logit].item() for j in range(13) if labels[j] == label]
        expected[branch, logit, label] = sum(members) / len(members)
    assert_close(analysis.class_summary(outputs, labels), expected, dtype)


def test_class_summary_of_a_perfect_classifier_peaks_on_the_diagonal():
    labels = torch.arange(12) % 4
    outputs = torch.eye(4)[labels].expand(2, 12, 4) / 2
    assert torch.equal(analysis.class_summary(outputs, labels).sum(0), torch.eye(4))
