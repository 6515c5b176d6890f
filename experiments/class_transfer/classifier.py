"""A small classifier that judges the transferred images: trained on real ones only, apart from both players."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.class_transfer.augment import augment, to_signal
from experiments.common.streams import stream

_CLASSIFIER = 3  # purpose of a stream of random numbers
_WIDTHS = (3, 16, 32, 64, 64)
_MOST_PIXELS = 64  # larger images are averaged down to that
_BATCH_SIZE = 64
_LR = 2e-3


class Classifier(nn.Sequential):
    """Four 3 x 3 convolutions with batch normalisation, each but the first of stride 2; the mean; a linear layer.

    Args:
        image_size: Height and width of the images.
        num_classes: Number of logits.
    """

    def __init__(self, image_size: int, num_classes: int) -> None:
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(min(image_size, _MOST_PIXELS))]
        for index, (before, after) in enumerate(pairwise(_WIDTHS)):
            stride = 2 if index else 1
            layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after)]
            layers.append(nn.ReLU())
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1], num_classes))


def train_classifier(
    images: Tensor, labels: Tensor, *, num_classes: int, steps: int, seed: int, device: str = "cpu"
) -> Classifier:
    """Train a classifier on real images by Adam, its rate falling as a half cosine, with the players' augmentation.

    Args:
        images: Pixels, uint8, shape ``(N, 3, H, W)``.
        labels: Class indices, int64, shape ``(N,)``.
        num_classes: Number of classes.
        steps: Number of steps, at least 1.
        seed: Seed of weights, batches and augmentation.
        device: Where to train.

    Returns:
        The classifier, in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(images.shape[-1], num_classes).to(device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=_LR, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), desc="classifier", disable=None):
        generator = stream(seed, _CLASSIFIER, step)
        chosen = torch.randint(len(images), (_BATCH_SIZE,), generator=generator)
        x = augment(to_signal(images[chosen].to(device)), generator=generator)
        loss = nn.functional.cross_entropy(classifier(x), labels[chosen].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label.

    Args:
        classifier: In eval mode, on any device.
        images: In -1 to 1; clamped to that, as a picture would be; shape ``(N, 3, H, W)``.
        labels: Class indices, int64, shape ``(N,)``, on the CPU.

    Returns:
        The share, 0 to 1.
    """
    device = next(classifier.parameters()).device
    with torch.no_grad():
        said = torch.cat([classifier(part.to(device).clamp(-1, 1)).argmax(1).cpu() for part in images.split(256)])
    return (said == labels).double().mean().item()
