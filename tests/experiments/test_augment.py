"""Augmentation and normalisation of image batches."""

import itertools

import pytest
import torch

from experiments.common.augment import augment, normalise


@pytest.mark.parametrize("flip", [False, True])
def test_augment_equals_cropping_one_image_after_the_other(flip):
    images = torch.randint(1, 256, (50, 3, 5, 7), dtype=torch.uint8)
    result = augment(images, generator=torch.Generator().manual_seed(1), pad=2, flip=flip)
    assert result.dtype == torch.uint8
    padded = torch.zeros(50, 3, 9, 11, dtype=torch.uint8)
    padded[:, :, 2:7, 2:9] = images
    seen = set()
    for image, source in zip(result, padded, strict=True):
        fits = [
            (top, left, flipped)
            for top, left, flipped in itertools.product(range(5), range(5), range(1 + flip))
            if torch.equal(image, source[:, top : top + 5, left : left + 7].flip(2 if flipped else ()))
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {flipped for _, _, flipped in seen} == set(range(1 + flip))


def test_normalise_is_that_of_cifar10():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    result = normalise(images)
    for channel, (mean, std) in enumerate(((0.4914, 0.2023), (0.4822, 0.1994), (0.4465, 0.2010))):
        torch.testing.assert_close(result[:, channel], (images[:, channel] / 255 - mean) / std)
