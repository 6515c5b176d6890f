"""Synthetic images: exact sums of their layers, functions of seed, index and class only, drawn as they should be."""

import pytest
import torch
from scipy import ndimage

from experiments.common.synthetic.layered import Canvas
from experiments.common.synthetic.raster import (
    blur,
    coverage,
    ellipse,
    grid,
    lambert,
    strands,
    stroke,
    triangle,
    turned,
)
from experiments.common.synthetic.sets import FIRST_TEST_INDEX, SETS, render_layers, synthetic_set

NAMES = list(SETS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_render_layers_sums_to_the_images(name, size):
    made = render_layers(name, 40, size, seed=3)
    assert made.images.dtype == torch.uint8
    assert made.images.shape == (40, 3, size, size)
    assert torch.equal(made.layers.sum(1), made.images.long())
    in_signal = made.images.float() * (2 / 255) - 1
    torch.testing.assert_close(made.signals().sum(1), in_signal, rtol=0, atol=1e-6)
    assert made.names == SETS[name].LAYERS
    assert len(made.names) == 8
    assert made.labels.tolist() == [index % len(made.classes) for index in range(40)]


@pytest.mark.parametrize("name", NAMES)
def test_render_layers_depends_on_seed_and_index_only(name):
    whole = render_layers(name, 40, 32, seed=3)
    part = render_layers(name, 3, 32, seed=3, start=35)
    assert torch.equal(whole.images[35:38], part.images)
    assert torch.equal(whole.layers[35:38], part.layers)
    assert torch.equal(whole.masks[35:38], part.masks)
    other = render_layers(name, 3, 32, seed=4, start=35)
    assert not torch.equal(part.images, other.images)
    assert len(whole.images.flatten(1).unique(dim=0)) == 40


@pytest.mark.parametrize("name", NAMES)
def test_render_layers_gives_every_layer_something_to_do(name):
    made = render_layers(name, 24, 64, seed=1)
    for index, layer in enumerate(made.names):
        changed = made.layers[:, index].abs().amax((1, 2, 3)) > 10
        assert changed.float().mean() >= 0.5, layer  # make-up is of one class
        if index > 0:  # a layer acts where its object is, and nowhere else but for edges and soft light
            outside = made.layers[:, index].abs().amax(1)[~made.masks[:, index]]
            inside = made.layers[:, index].abs().amax(1)[made.masks[:, index]]
            assert inside.float().mean() > 2 * outside.float().mean(), layer


@pytest.mark.parametrize("name", NAMES)
def test_render_layers_of_another_class_is_the_same_scene(name):
    classes = len(SETS[name].CLASSES)
    own = [render_layers(name, 6, 32, seed=1, labels=torch.full((6,), label)) for label in range(classes)]
    assert all(made.labels.unique().tolist() == [label] for label, made in enumerate(own))
    corner = [made.images[:, :, :2, :2].float().mean((2, 3)) for made in own]
    torch.testing.assert_close(corner[0], corner[1], rtol=0, atol=30)  # the background
    assert not torch.equal(own[0].images, own[1].images)


@pytest.mark.parametrize("name", NAMES)
def test_render_layers_without_one_leaves_those_below_it_alone(name):
    made, without = (render_layers(name, 6, 32, seed=1, omit=omit) for omit in ((), ("eyes",)))
    eyes = made.names.index("eyes")
    assert torch.equal(made.layers[:, :eyes], without.layers[:, :eyes])
    assert (without.layers[:, eyes] == 0).all()
    assert torch.equal(made.masks, without.masks)
    far = ndimage.binary_dilation(made.mask("eyes").numpy(), iterations=3, structure=torch.ones(1, 3, 3).numpy())
    same = (made.images == without.images).all(1)
    assert same[torch.from_numpy(~far)].all()


def test_cats_have_two_eyes():
    made = render_layers("SynthAnimals", 30, 64, seed=2, labels=torch.zeros(30, dtype=torch.int64))
    counts = [ndimage.label(mask)[1] for mask in made.mask("eyes").numpy()]
    assert counts == [2] * 30


def test_synthetic_set_has_balanced_classes_and_a_test_set_of_its_own():
    dataset = synthetic_set("SynthAnimals", 16, train_images=33, test_images=6, seed=5)
    assert dataset.train_labels.bincount().tolist() == [11, 11, 11]
    assert dataset.classes == ("cat", "dog", "wild")
    assert dataset.note == "SynthAnimals, 33 training and 6 test images of 16 x 16 pixels, seed 5"
    more = synthetic_set("SynthAnimals", 16, train_images=64, test_images=6, seed=5)
    assert torch.equal(more.train_images[:33], dataset.train_images)
    assert torch.equal(more.test_images, dataset.test_images)
    start = render_layers("SynthAnimals", 6, 16, seed=5, start=FIRST_TEST_INDEX, labels=dataset.test_labels)
    assert torch.equal(start.images, dataset.test_images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "SynthPlants"}, "name must be one of SynthAnimals, SynthFaces, got 'SynthPlants'"),
        ({"count": 0}, "there must be at least 1 image, got 0"),
        ({"size": 48}, "size must be a power of 2 from 16, got 48"),
        ({"labels": torch.tensor([0, 3])}, r"labels must be 2 classes in 0 to 2, got \[0, 3\]"),
        ({"labels": torch.tensor([0])}, r"labels must be 2 classes in 0 to 2, got \[0\]"),
        ({"omit": ("horns",)}, "omit must be of pattern, fur, .*, got horns"),
        ({"omit": ("base",)}, "omit must be of pattern, fur, .*, got base"),
    ],
)
def test_render_layers_refuses(change, message):
    arguments = {"name": "SynthAnimals", "count": 2, "size": 16} | change
    with pytest.raises(ValueError, match=message):
        render_layers(**arguments)


def test_canvas_refuses_what_leaves_the_range():
    canvas = Canvas(frozenset())
    canvas.paint("base", torch.full((1, 3, 4, 4), 0.9), torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match=r"layer light must keep the image in 0 to 1, got 1\.1 to 1\.1"):
        canvas.paint("light", lambda image: image + 0.2, torch.ones(1, 4, 4))


def test_shapes_cover_their_area():
    x, y = grid(128)
    pixel = (2 / 128) ** 2
    disc = coverage(ellipse(x - 0.1, y, 0.5, 0.3), 128).sum() * pixel
    torch.testing.assert_close(disc.item(), torch.pi * 0.15, rtol=5e-3, atol=0)
    u, v = turned(x, y, 0.4)
    wedge = coverage(torch.maximum(triangle(u, v, 0.4, 0.8), v), 128).sum() * pixel
    torch.testing.assert_close(wedge.item(), 0.32, rtol=0.06, atol=0)
    for width in (0.1, 0.004):  # the latter is a quarter of a pixel
        line = stroke(torch.maximum(y.abs().expand(1, 128, 128), x.abs() - 0.5), width, 128).sum() * pixel
        torch.testing.assert_close(line.item(), width * (1 + width), rtol=0.05, atol=0)


def test_strands_are_smooth_along_their_direction_only():
    noise = torch.randn(1, 64, 64)
    along = strands(noise, torch.ones(1, 64, 64), torch.zeros(1, 64, 64), 0.4)
    roughness = [along.diff(dim=axis).square().mean().item() for axis in (2, 1)]
    assert roughness[0] < 0.3 * roughness[1]
    torch.testing.assert_close(along.std().item(), 1.0, rtol=1e-3, atol=0)


def test_blur_is_a_gaussian_or_close_to_one():
    noise = torch.randn(1, 128, 128)
    for scale, tolerance in ((0.02, 1e-2), (0.1, 0.3)):
        expected = ndimage.gaussian_filter(noise[0].numpy(), scale * 64, mode="mirror")
        error = (blur(noise, scale)[0] - torch.from_numpy(expected)).square().mean().sqrt()
        assert error < tolerance * expected.std()


def test_lambert_is_the_cosine_of_a_slope():
    x, _ = grid(64)
    slope = (0.5 * x).expand(1, 64, 64)
    torch.testing.assert_close(lambert(slope, -0.5, 0.0), torch.ones(1, 64, 64))
    expected = (1 - 0.25) / 1.25
    torch.testing.assert_close(lambert(slope, 0.5, 0.0), torch.full((1, 64, 64), expected))
