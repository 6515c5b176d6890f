"""The classifier experiment: parameter counts, the loss against closed forms, verdicts, and a tiny run."""

import dataclasses
import math

import pytest
import torch

from experiments.classifier import claims
from experiments.classifier.loss import branched_loss, loss_floor, saturated_shares, soft_targets
from experiments.classifier.model import WIDTHS, make_branch
from experiments.classifier.run import Setup, run
from experiments.common.data import load_digits
from experiments.common.record import Run
from experiments.common.training import Options


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


def test_judge_counts_needs_the_models_it_names():
    counts = {8: (6, 2), 16: (8, 8), 32: (10, 22)}
    assert [claim.holds for claim in claims.judge_counts(counts)] == [True, True]
    assert [claim.holds for claim in claims.judge_counts(counts | {32: (24, 8)})] == [False, False]
    assert [claim.holds for claim in claims.judge_counts({16: (8, 8)})] == [None, None]
    assert "needs models of M=8, 16 and 32" in claims.judge_counts({16: (8, 8)})[0].measured


def test_judge_covariance_by_hand():
    alike, apart = torch.ones(2, 3, 2), torch.eye(2)[:, None, :].expand(2, 3, 2)
    assert claims.judge_covariance(alike, apart).holds is True
    assert claims.judge_covariance(apart, alike).holds is False
    assert claims.judge_covariance(alike[:1], alike[:1]).holds is None


@pytest.mark.parametrize(
    ("scales", "verdicts"),
    [
        ([1.0] * 12 + [4.0] * 4, [True, False, True]),
        ([0.01] * 15 + [1.0], [True, True, True]),
        ([-1.0], [None, None, False]),
    ],
)
def test_judge_outputs_by_hand(scales, verdicts):
    labels = torch.arange(6) % 3
    outputs = torch.tensor(scales)[:, None, None] * (torch.nn.functional.one_hot(labels, 3) - 0.5)
    assert [claim.holds for claim in claims.judge_outputs(outputs, labels)] == verdicts


def test_not_learnt_by_hand():
    labels = torch.arange(10)
    outputs = torch.nn.functional.one_hot(labels, 10).float()[None]
    assert claims.not_learnt(outputs, labels) is None
    assert claims.not_learnt(outputs, torch.where(labels < 3, labels, (labels + 1) % 10)) is None
    reason = claims.not_learnt(outputs, torch.where(labels < 2, labels, (labels + 1) % 10))
    assert reason.startswith("M=1 has not learnt: test accuracy 20.0%, chance 10.0%, all logits outside [-1, 1] on 0%")
    claim = claims.Claim("Fig. 6", "it is", "it was", True)
    assert claims.withhold(claim, None) == claim
    assert claims.withhold(claim, reason) == ("Fig. 6", "it is", f"it was; {reason}", None)


@pytest.fixture(scope="module")
def digits():
    digits = load_digits()
    return dataclasses.replace(digits, test_images=digits.test_images[:60], test_labels=digits.test_labels[:60])


SETUP = Setup(branches=3, all_m=(2,), widths=(1, 1, 2, 2), train_images=64, speed_repeats=2)


def test_run_records_figures_claims_and_speed(tmp_path, digits):
    record = Run("classifier", {"seed": 0}, root=tmp_path)
    run(record, digits, SETUP, Options(epochs=1, batch_size=32))
    assert [entry["name"] for entry in record.figures] == [
        "fig5-left",
        "fig5-middle",
        "fig6",
        "fig6-summary",
        "training",
    ]
    assert all(
        "Scaled down: widths 1, 1, 2, 2, 64 training images, 2 steps, hard clamp. Data" in entry["note"]
        for entry in record.figures
    )
    assert [claim["figure"] for claim in record.claims] == ["Fig. 5 left"] * 2 + ["Fig. 5 middle"] + ["Fig. 6"] * 3
    assert record.metrics["m3_steps"] == 2
    assert 0 <= record.metrics["m2_test_accuracy"] <= 1
    assert record.metrics["m3_test_loss_above_floor_nats"] > 0
    assert [row["baseline"] for row in record.metrics["speed"]["rows"]] == [False, True, True]


def test_run_is_the_same_for_one_seed(tmp_path, digits):
    setup = dataclasses.replace(SETUP, all_m=(), branches=2, speed_repeats=0, readout_scale=None)
    claims_of = []
    for seed in (0, 0, 1):
        record = Run("classifier", {}, root=tmp_path)
        run(record, digits, setup, Options(epochs=1, batch_size=32, seed=seed))
        claims_of.append((record.claims, record.metrics["m2_norms"]))
    assert claims_of[0] == claims_of[1] != claims_of[2]


def test_run_refuses_more_images_than_there_are(tmp_path, digits):
    for name, available in (("train_images", 1437), ("test_images", 60)):
        setup = dataclasses.replace(SETUP, **{name: 9999})
        with pytest.raises(ValueError, match=f"{name} must be in 1 to {available} for digits, got 9999"):
            run(Run("classifier", {}, root=tmp_path), digits, setup, Options())
