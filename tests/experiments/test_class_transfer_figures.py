"""Pictures, figures and the numbers of the class transfer, on decompositions that are known."""

import argparse
import json

import numpy as np
import pytest
import torch
from torch import nn

from experiments import figure
from experiments.class_transfer import figures, pictures
from experiments.class_transfer.augment import to_signal
from experiments.class_transfer.classifier import accuracy, train_classifier
from experiments.class_transfer.decomposer import Decomposition
from experiments.class_transfer.measure import low_pass_psnr
from experiments.common.data import ImageSet
from experiments.common.drawing import decode
from experiments.common.record import Run
from experiments.common.synthetic.sets import synthetic_set


class Known(nn.Module):
    """R is a half of x; branch k adds k, a stripe of its own."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def decompose(self, x, target):
        v = torch.zeros(3, *x.shape)
        for k in range(3):
            v[k, :, :, 4 * k : 4 * k + 4] = 0.1 * (k + 1)
        v = v + 0.05 * target.view(1, -1, 1, 1, 1)
        return Decomposition(x / 2 + v.sum(0), x / 2, v, None)


def images_of(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pixels = torch.randint(256, (len(labels), 3, 16, 16), dtype=torch.uint8)
    names = tuple("abc"[: len(counts)])
    return ImageSet("known", "known data", pixels, labels, pixels, labels, classes=names)


def test_shown_images_takes_classes_in_turn():
    dataset = images_of([2, 1, 3])
    x, labels = pictures.shown_images(dataset, 5)
    assert labels.tolist() == [0, 1, 2, 0, 2]
    assert torch.equal(x, to_signal(dataset.test_images[[0, 2, 3, 1, 4]]))
    assert len(pictures.shown_images(dataset, 9)[1]) == 6


def test_gains_bring_995_of_1000_pixels_into_range():
    v = torch.randn(3, 4, 3, 32, 32) * torch.tensor([0.01, 1.0, 50.0]).view(3, 1, 1, 1, 1)
    inside = (pictures.amplified(v).abs() <= 1).flatten(1).double().mean(1)
    torch.testing.assert_close(inside, torch.full((3,), 0.995, dtype=torch.float64), atol=2e-4, rtol=0)
    expected = np.percentile(v.abs().flatten(1).numpy(), 99.5, axis=1)
    np.testing.assert_allclose(1 / pictures.gains(v).numpy(), expected, rtol=1e-2)


def test_reduced_averages_down_to_64_pixels():
    pixels = np.zeros((1, 2, 3, 128, 128), dtype=np.uint8)
    pixels[..., ::2, :] = 100
    assert (pictures.reduced(pixels) == 50).all()
    assert pictures.reduced(pixels).shape == (1, 2, 3, 64, 64)
    assert pictures.reduced(pixels[..., :32, :32]).shape == (1, 2, 3, 32, 32)


def test_two_groups_parts_fine_from_coarse_and_grey_from_colourful():
    noise = torch.randn(5, 2, 1, 32, 32).expand(-1, -1, 3, -1, -1)
    coarse = nn.functional.interpolate(torch.randn(10, 1, 4, 4), size=(32, 32), mode="bilinear").view(5, 2, 1, 32, 32)
    v = torch.cat([coarse.expand_as(noise)[:2], noise[:3]])
    assert pictures.two_groups(v) == ([2, 3, 4], [0, 1])
    colourful = noise[:4].clone()
    colourful[:2] *= torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1)
    assert sorted(pictures.two_groups(colourful)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("counts", "numbers"), [([2, 2], (9, 10, 13, 15, 18, 19)), ([1, 0, 1], (9, 11, 14, 15, 18, 20))]
)
def test_draw_figures_shows_parts_and_sweeps(tmp_path, counts, numbers):
    record = Run("class-transfer", {}, tmp_path)
    dataset = images_of(counts)
    figures.draw_figures(record, Known(), dataset, "Made by hand.")
    assert [entry["name"] for entry in record.figures] == ["transfer", *(f"figure-{number}" for number in numbers)]
    assert all(entry["note"].endswith("Made by hand.") for entry in record.figures)
    x = to_signal(dataset.test_images[:1])
    parts = Known().decompose(x, torch.tensor([0]))
    sweep = images_in(record, f"figure-{numbers[2]}")
    for row, alpha in enumerate((-1.0, 0.0, 1.0, 2.0, 3.0)):
        for k in range(3):
            expected = parts.R + parts.v.sum(0) - parts.v[k] + alpha * parts.v[k]
            near(sweep[row, k], pictures.to_pixels(expected)[0])
    shown = images_in(record, f"figure-{numbers[1]}")
    near(shown[1, 2], pictures.to_pixels(parts.f + parts.v[2])[0])
    note = next(entry["note"] for entry in record.figures if entry["name"] == f"figure-{numbers[1]}")
    assert "99.5 % of a branch's pixels" in note
    textures = images_in(record, "figure-15")
    near(textures[0, 2], pictures.to_pixels(x / 2)[0])
    assert record.claims[0]["figure"] == "Fig. 15"


def images_in(record, name):
    stored = json.loads((record.folder / f"{name}.json").read_text())
    return np.asarray(decode(stored["data"])["images"])


def near(pixels, expected):
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1


def test_low_pass_psnr_is_blind_to_fine_detail():
    x = torch.rand(2, 3, 32, 32) - 0.5
    assert low_pass_psnr(x + 0.2, x, 2.0) == pytest.approx(20.0, abs=1e-3)  # 0.1 of the range
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16)
    assert low_pass_psnr(x + checkers, x, 2.0) > 40


def test_train_classifier_tells_synthetic_animals():
    dataset = synthetic_set("SynthAnimals", 16, train_images=300, test_images=90)
    one, two = (
        train_classifier(dataset.train_images, dataset.train_labels, num_classes=3, steps=60, seed=seed)
        for seed in (0, 0)
    )
    reached = accuracy(one, to_signal(dataset.test_images), dataset.test_labels)
    assert reached > 0.7
    assert accuracy(two, to_signal(dataset.test_images), dataset.test_labels) == reached
    assert accuracy(one, to_signal(dataset.test_images), (dataset.test_labels + 1) % 3) < 0.3


def test_figure_makes_a_run_of_the_right_experiment_and_data():
    def words(number, data=None):
        return figure.words_of_a_run(argparse.Namespace(number=number, out="runs", budget="cpu", data=data))

    assert words(13) == ["class-transfer", "--out", "runs", "--budget", "cpu", "--data", "faces"]
    assert words(14) == ["class-transfer", "--out", "runs", "--budget", "cpu"]
    assert words(10, "celeba") == ["class-transfer", "--out", "runs", "--budget", "cpu", "--data", "celeba"]
