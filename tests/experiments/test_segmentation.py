"""Segmentation on drawings whose eyes are known, and each step against another way to compute it."""

import numpy as np
import pytest
import torch

from experiments.segmentation.chan_vese import chan_vese
from experiments.segmentation.components import ComponentSets, choose_components, otsu, pictures, segment, values
from experiments.segmentation.regions import count_regions, dice, pairs, roc_area

SIZE = 32


def discs(*places, radius=3.0):
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.any([(x - column) ** 2 + (y - row) ** 2 <= radius**2 for row, column in places], axis=0)


EYES = discs((12, 9), (12, 22))


def test_chan_vese_equals_skimage():
    skimage = pytest.importorskip("skimage.segmentation", reason="scikit-image is no requirement")
    generator = np.random.default_rng(0)
    for options in ({}, {"mu": 0.25, "lambda1": 1.0}, {"iterations": 7, "step": 0.3}):
        image = EYES + 0.4 * generator.standard_normal(EYES.shape)
        start = generator.standard_normal(EYES.shape)
        own = {"mu": 0.05, "lambda1": 2.0, "lambda2": 1.0, "step": 0.5, "tolerance": 1e-3, "iterations": 500} | options
        expected = skimage.chan_vese(
            image,
            mu=own["mu"],
            lambda1=own["lambda1"],
            lambda2=own["lambda2"],
            tol=own["tolerance"],
            max_num_iter=own["iterations"],
            dt=own["step"],
            init_level_set=start,
        )
        assert (chan_vese(image, start, **options) == expected).mean() >= 0.995


def test_chan_vese_step_equals_the_formula_pixel_by_pixel():
    generator = np.random.default_rng(1)
    image, phi = generator.random((5, 6)), generator.standard_normal((5, 6))
    mu, inner, outer, step = 0.3, 2.0, 1.5, 0.4
    scaled = (image - image.min()) / (image.max() - image.min())
    means = scaled[phi > 0].mean(), scaled[phi <= 0].mean()

    def at(row, column):
        return phi[min(max(row, 0), 4), min(max(column, 0), 5)]

    expected = np.empty_like(phi)
    for row, column in np.ndindex(5, 6):
        here, right, left = phi[row, column], at(row, column + 1), at(row, column - 1)
        below, above = at(row + 1, column), at(row - 1, column)
        coefficients = [
            1 / np.hypot(right - here, (below - above) / 2),
            1 / np.hypot(here - left, (below - above) / 2),
            1 / np.hypot(below - here, (right - left) / 2),
            1 / np.hypot(here - above, (right - left) / 2),
        ]
        force = mu * np.dot(coefficients, [right, left, below, above])
        force += outer * (scaled[row, column] - means[1]) ** 2 - inner * (scaled[row, column] - means[0]) ** 2
        delta = 1 / (1 + here**2)
        expected[row, column] = (here + step * delta * force) / (1 + mu * step * delta * sum(coefficients))
    made = chan_vese(image, phi, mu=mu, lambda1=inner, lambda2=outer, step=step, iterations=1)
    np.testing.assert_array_equal(made, expected > 0)


def test_chan_vese_finds_what_is_brighter():
    generator = np.random.default_rng(2)
    image = EYES + 0.1 * generator.standard_normal(EYES.shape)
    start = discs((12, 9), (12, 22), radius=5.0) - 0.5
    assert dice(chan_vese(image, start), EYES) > 0.95
    assert not chan_vese(np.ones((4, 4)), -np.ones((4, 4))).any()
    with pytest.raises(
        ValueError, match=r"image and start must have one shape \(\.\.\., H, W\), got \(4, 4\) and \(4, 5\)"
    ):
        chan_vese(np.ones((4, 4)), np.ones((4, 5)))


def test_chan_vese_divides_each_image_as_if_alone():
    generator = np.random.default_rng(5)
    images = np.stack([EYES + 0.3 * generator.standard_normal(EYES.shape), np.ones(EYES.shape), 9.0 * EYES])
    starts = np.stack([generator.standard_normal(EYES.shape), -np.ones(EYES.shape), EYES - 0.5])
    alone = [chan_vese(image, start, iterations=60) for image, start in zip(images, starts, strict=True)]
    np.testing.assert_array_equal(chan_vese(images, starts, iterations=60), alone)


def test_roc_area_equals_sklearn():
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(6)
    eyes = np.stack([EYES, np.zeros_like(EYES), ~EYES])
    made = np.round(generator.standard_normal(eyes.shape) + eyes, 1)  # with ties
    expected = np.mean([roc_auc_score(eyes[k].ravel(), made[k].ravel()) for k in (0, 2)])
    assert roc_area(made, eyes) == pytest.approx(expected)


def test_otsu_equals_the_search_over_all_thresholds():
    generator = np.random.default_rng(3)
    image = np.concatenate([generator.normal(0, 1, 60), generator.normal(4, 0.5, 20)])

    def within(threshold):
        groups = image[image <= threshold], image[image > threshold]
        return sum(len(group) * group.var() for group in groups if len(group))

    best = min(within(value) for value in image)
    assert within(otsu(image)) == pytest.approx(best)


def test_values_are_those_of_hsv_after_scaling():
    v = np.array([[[-1.0, 1.0]], [[0.0, 3.0]], [[-1.0, -1.0]]])
    np.testing.assert_allclose(values(v), [[0.25, 1.0]])
    np.testing.assert_array_equal(values(np.ones((3, 2, 2))), np.zeros((2, 2)))


def test_pairs_keeps_two_regions_side_by_side():
    mouth = discs((24, 16))
    np.testing.assert_array_equal(pairs(EYES | mouth), EYES)
    assert not pairs(discs((12, 5), (12, 15), (12, 25))).any()
    assert count_regions(pairs(discs((8, 9), (12, 22)))) == 2  # rows 5 to 11 and 9 to 15: 3 of 11 in common
    assert not pairs(discs((7, 9), (12, 22))).any()  # 2 of 12
    assert not pairs(np.zeros((SIZE, SIZE), dtype=bool)).any()
    column = np.zeros((SIZE, SIZE), dtype=bool)  # the region on the left has a partner above, which has two below
    column[0:10, 2:5] = column[0:20, 10:13] = column[12:18, 18:21] = column[12:18, 26:29] = True
    assert not pairs(column).any()
    large = np.zeros((64, 64), dtype=bool)
    large[10:15, 10:15] = large[10:15, 40:45] = large[12, 60:64] = True  # 4 pixels are less than 0.4 %
    assert count_regions(large) == 3
    assert count_regions(pairs(large)) == 2


def test_pictures_are_smoothed_values_of_parts_and_of_their_magnitude():
    v = np.random.default_rng(7).standard_normal((2, 3, 3, SIZE, SIZE))
    made = pictures(v)
    assert list(made) == ["v1", "-v1", "|v1|", "-|v1|", "v2", "-v2", "|v2|", "-|v2|"]
    for name, signal in (("v2", v[1]), ("|v2|", np.abs(v[1]))):
        low, high = signal.min((1, 2, 3)), signal.max((1, 2, 3))
        bright = torch.tensor((signal.max(1) - low[:, None, None]) / (high - low)[:, None, None])
        bell = torch.exp(-(torch.arange(-4.0, 5, dtype=bright.dtype) ** 2) / 2)  # of 1 pixel
        padded = torch.nn.functional.pad(bright[:, None], [4] * 4, mode="replicate")
        smooth = torch.nn.functional.conv2d(padded, (torch.outer(bell, bell) / bell.sum() ** 2)[None, None])[:, 0]
        np.testing.assert_allclose(made[name], smooth, atol=1e-12)
        np.testing.assert_array_equal(made[f"-{name}"], 1 - made[name])


@pytest.mark.parametrize("kind", ["bright", "texture of both signs"])
def test_segment_finds_eyes_from_parts_that_show_them(kind):
    generator = np.random.default_rng(4)
    places = [((12 + shift, 9 + shift), (12 + shift, 22 + shift)) for shift in (-2, 0, 3, 5, -4, 1)]
    eyes = np.stack([discs(*own) for own in places])
    v = 0.2 * generator.standard_normal((4, len(eyes), 3, SIZE, SIZE))
    checks = np.where(np.indices((SIZE, SIZE)).sum(0) % 2, 1, -1)
    v[1] += 2 * (eyes * (checks if kind != "bright" else 1))[:, None]
    chosen = choose_components(v[:, :3], eyes[:3])
    assert {"v2", "|v2|"} & set(chosen.locating)
    assert not {"-v2", "-|v2|"} & set(chosen.locating)
    assert {"v2", "|v2|"} & set(chosen.constant)
    made = segment(v[:, 3:], chosen)
    for mask, start, truth in zip(made.mask, made.start, eyes[3:], strict=True):
        assert dice(mask, truth) > 0.9
        assert count_regions(mask) == 2
        assert (start[truth] > 0).mean() > 0.5
        assert not (start[~truth] > 0).any()


def test_choose_components_keeps_the_paper_weights_where_none_is_better():
    v = np.zeros((2, 1, 3, SIZE, SIZE))
    chosen = choose_components(v, EYES[None])
    assert (chosen.mu, chosen.lambda1) == (0.05, 2.0)


def test_dice_by_hand():
    one, other = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert dice(one, other) == 0.5
    assert dice(one, ~one) == 0
    assert dice(one & ~one, one & ~one) == 1


def test_choose_components_averages_large_images_down_and_segment_scales_the_weight_of_length():
    generator = np.random.default_rng(8)
    eyes = np.stack([discs((12, 9), (12, 22)), discs((15, 8), (14, 21))]).repeat(2, 1).repeat(2, 2)
    v = 0.2 * generator.standard_normal((2, 2, 3, 64, 64)) + 2 * np.stack([0 * eyes, eyes])[:, :, None]
    chosen = choose_components(v, eyes)
    larger = choose_components(v.repeat(2, 3).repeat(2, 4), eyes.repeat(2, 1).repeat(2, 2))
    assert larger == chosen
    made = segment(v, chosen)
    expected = chan_vese(made.image, made.start, mu=2 * chosen.mu, lambda1=chosen.lambda1, iterations=chosen.steps)
    np.testing.assert_array_equal(made.mask, [pairs(mask) for mask in expected])


def test_segmentation_errors_name_what_was_expected_and_what_came():
    v, eyes = np.zeros((2, 3, 3, SIZE, SIZE)), np.stack([EYES] * 3)
    for wrong in (v[0], v[:, :0], v[:, :, :2], v[..., :4]):
        with pytest.raises(
            ValueError, match=r"segmentation: v must have shape \(M, N, 3, H, W\) of 8 pixels or more, got "
        ):
            choose_components(wrong, eyes)
    with pytest.raises(ValueError, match="segmentation: v must be floating and finite, got float64, 1 not finite"):
        choose_components(np.where(np.arange(v.size).reshape(v.shape) == 5, np.nan, v), eyes)
    with pytest.raises(ValueError, match=r"segmentation: eyes must have shape \(3, 32, 32\), got \(2, 32, 32\)"):
        choose_components(v, eyes[:2])
    with pytest.raises(ValueError, match=r"sets must name some of v1, -v1, \|v1\|, .*, got none"):
        segment(v, ComponentSets(("v1",), ()))
    with pytest.raises(ValueError, match="got v1, v3"):
        segment(v, ComponentSets(("v1", "v3"), ("v1",)))


@pytest.mark.parametrize("size", [65, 100, 130])
def test_choose_components_takes_any_size(size):
    generator = np.random.default_rng(9)
    eyes = np.zeros((1, size, size), dtype=bool)
    eyes[:, size // 3 : size // 2, size // 6 : size // 3] = eyes[:, size // 3 : size // 2, -size // 3 : -size // 6] = (
        True
    )
    v = 0.1 * generator.standard_normal((1, 1, 3, size, size)) + eyes[:, None]
    (mask,) = segment(v, choose_components(v, eyes)).mask
    assert count_regions(mask) == 2
    assert dice(mask, eyes[0]) > 0.6
