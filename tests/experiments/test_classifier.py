"""The classifier's branch and loss: parameter counts, and closed forms."""

import math

import pytest
import torch

from experiments.classifier.loss import (
    branched_loss,
    branched_losses,
    loss_floor,
    saturated_shares,
    soft_targets,
    sum_gradient,
)
from experiments.classifier.model import WIDTHS, make_branch


@pytest.mark.parametrize(
    ("widths", "count"),
    [(WIDTHS["paper"], 82_578), (WIDTHS["scaled"], 80_973), (WIDTHS["cpu-small"], 21_006), ((4, 8, 16, 32), 44_622)],
)
def test_make_branch_parameter_count(widths, count):
    assert sum(parameter.numel() for parameter in make_branch(widths).parameters()) == count


@pytest.mark.parametrize("width", [1, 5, 8])
def test_make_branch_parameter_count_formula(width):
    parameters = make_branch((width, 2 * width, 4 * width, 8 * width)).parameters()
    assert sum(parameter.numel() for parameter in parameters) == 2724 * width**2 + 257 * width + 10


def test_make_branch_maps_images_to_logits():
    branch = make_branch((2, 3, 4, 5), 7)
    assert branch(torch.randn(3, 3, 32, 32)).shape == (3, 7)
    stages = [branch.layer1, branch.layer2, branch.layer3, branch.layer4]
    assert [stage[0].conv1.stride[0] for stage in stages] == [1, 2, 2, 2]
    assert [len(stage[0].shortcut) for stage in stages] == [0, 2, 2, 2]


def test_make_branch_refuses():
    with pytest.raises(ValueError, match=r"widths must be 4 positive integers, got \(1, 2, 3\)"):
        make_branch((1, 2, 3))
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        make_branch((1, 1, 1, 1), 0)


def test_soft_targets_are_those_of_the_paper():
    target = soft_targets(torch.tensor([3]))[0]
    assert target[3].item() == pytest.approx(0.450853, abs=1e-6)
    assert target[0].item() == pytest.approx(0.061016, abs=1e-6)


@pytest.mark.parametrize(
    ("right", "wrong", "expected"), [(0, 0, math.log(10)), (1, -1, 1.894908), (-1, 1, 3.1139), (9, -9, 1.894908)]
)
def test_branched_loss_closed_forms(right, wrong, expected):
    f = torch.full((1, 10), float(wrong), dtype=torch.float64)
    f[0, 4] = right
    assert branched_loss(f, torch.tensor([4])).item() == pytest.approx(expected, abs=1e-4)
    assert loss_floor() == pytest.approx(1.894908, abs=1e-6)


def by_rule(f, labels, clamp):
    """Gradient of the loss by the paper's formula, g = softmax(clamp(f)) - p, masked."""
    inside = f if clamp == "none" else f.clamp(-1, 1)
    g = (torch.softmax(inside, 1) - soft_targets(labels).to(f.dtype)) / len(f)
    for sample in range(len(f)):
        for c in range(10):
            value, slope = f[sample, c].item(), g[sample, c].item()
            helps = (value > 1 and slope > 0) or (value < -1 and slope < 0)
            if clamp != "none" and abs(value) > 1 and not (clamp == "one_sided" and helps):
                g[sample, c] = 0
    return g


@pytest.mark.parametrize("clamp", ["hard", "one_sided", "none"])
def test_branched_loss_gradient_by_formula(clamp):
    f = (2 * torch.randn(20, 10, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(10, (20,))
    branched_loss(f, labels, clamp=clamp).backward()
    torch.testing.assert_close(f.grad, by_rule(f.detach(), labels, clamp), rtol=0, atol=1e-8)


@pytest.mark.parametrize("clamp", ["hard", "one_sided", "none"])
def test_sum_gradient_is_that_of_each_sample(clamp):
    f, labels = 2 * torch.randn(20, 10, dtype=torch.float64), torch.randint(10, (20,))
    expected = len(f) * by_rule(f, labels, clamp)
    torch.testing.assert_close(sum_gradient(f, labels, clamp=clamp), expected, rtol=0, atol=1e-7)


def test_branched_losses_of_several_networks():
    f, labels = torch.randn(3, 5, 10), torch.randint(10, (5,))
    losses = branched_losses(f, labels)
    assert losses.shape == (3, 5)
    for own, network in zip(losses, f, strict=True):
        torch.testing.assert_close(own.mean(), branched_loss(network, labels))


def test_branched_loss_one_sided_passes_more_than_hard():
    f = torch.full((1, 10), 3.0, requires_grad=True)
    grads = {}
    for clamp in ("hard", "one_sided"):
        (grads[clamp],) = torch.autograd.grad(branched_loss(f, torch.tensor([0]), clamp=clamp), f)
    assert grads["hard"].count_nonzero() == 0
    assert (grads["one_sided"][0, 1:] > 0).all()
    assert grads["one_sided"][0, 0] == 0


def test_branched_loss_refuses_a_clamp():
    with pytest.raises(ValueError, match="clamp must be one of hard, one_sided, none, got 'soft'"):
        branched_loss(torch.zeros(1, 10), torch.tensor([0]), clamp="soft")


def test_saturated_shares_by_hand():
    assert saturated_shares(torch.tensor([[2.0, -3.0], [1.0, 1.1]])) == (0.75, 0.5)
