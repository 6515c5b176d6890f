"""Training of the two players: losses against closed forms, accumulation, resume bit for bit, precision, refusals."""

import copy
import math
import os
import signal
import time

import pytest
import torch
from torch import nn

import bsfast
from experiments.class_transfer import training
from experiments.class_transfer.augment import augment, to_signal
from experiments.class_transfer.average import update_average
from experiments.class_transfer.decomposer import Decomposer
from experiments.class_transfer.discriminator import Discriminator
from experiments.class_transfer.generator import make_branch
from experiments.class_transfer.loss import discriminator_loss, generator_loss, gradient_penalty
from experiments.class_transfer.smoothers import make_smoother
from experiments.class_transfer.training import Options, Players, train
from experiments.class_transfer.warm_start import warm_start
from experiments.common.gaussian import gaussian_smooth
from experiments.common.interrupt import Stopped
from experiments.common.synthetic.sets import render_layers

OPTIONS = Options(steps=4, batch_size=4, report_steps=2)


@pytest.fixture(scope="module")
def data():
    made = render_layers("SynthAnimals", 12, 32)
    return made.images, made.labels


def make_players(smoother="learnt", dtype=torch.float32):
    torch.manual_seed(0)
    net = bsfast.fuse([make_branch(32, 3, (2, 4)) for _ in range(2)])
    own = make_smoother(smoother, image_size=32, bands=2)
    decomposer = Decomposer(net, own, 3, "bands" if own.splits else "image")
    return Players.start(decomposer.to(dtype), Discriminator(32, 3, 2, 4).to(dtype))


def state(players):
    return {
        f"{name}.{key}": value for name, net in players._asdict().items() for key, value in net.state_dict().items()
    }


def same(one, other):
    one, other = state(one), state(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_losses_are_those_of_a_classifier_of_real_and_generated():
    real, fake = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected = -(torch.log(torch.sigmoid(real)) + torch.log(1 - torch.sigmoid(fake))).mean()
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -torch.log(torch.sigmoid(fake)).mean())
    zero = torch.zeros(3)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))


def test_gradient_penalty_of_a_quadratic_logit():
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(scale * x.square().flatten(1).sum(1), x)  # its gradient is 2 scale x
    energy = x.detach().square().flatten(1).sum(1).mean()
    torch.testing.assert_close(penalty, 2 * scale.square() * energy)
    torch.testing.assert_close(torch.autograd.grad(penalty, scale)[0], 4 * scale.detach() * energy)


def test_augment_crops_and_flips():
    x = torch.linspace(-1, 1, 32).expand(400, 3, 32, 32)  # grey value is the position
    made = augment(x, generator=torch.Generator().manual_seed(1))
    slope = (made[:, 0, 16, -1] - made[:, 0, 16, 0]) / 2
    whole = (slope.abs() - 1).abs() < 1e-5
    assert 0.4 < (slope < 0).float().mean() < 0.6
    assert 0.4 < whole.float().mean() < 0.6
    torch.testing.assert_close(made[whole & (slope > 0)], x[whole & (slope > 0)], rtol=0, atol=1e-5)
    assert slope.abs().min() > (0.8 / 1.1) ** 0.5 - 0.03  # smallest width: sqrt(area x aspect)
    assert made.abs().max() <= 1 + 1e-6
    again = augment(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made, again)


def test_to_signal_maps_levels_to_minus_one_to_one():
    assert to_signal(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("steps", [5, 40])
def test_update_average_is_a_moving_average(steps):
    net = nn.Linear(2, 1)
    average = copy.deepcopy(net)
    expected = net.weight.detach().double().clone()
    for step in range(steps):
        with torch.no_grad():
            net.weight.add_(1.0)
        update_average(average, net, decay=0.6, step=step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach().double()
    torch.testing.assert_close(average.weight.detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_train_improves_both_players_by_adam_on_their_own_losses(data):
    players = make_players("gaussian", torch.float32)
    before = copy.deepcopy(players)
    train(players, *data, options=Options(steps=1, batch_size=4, weight_decay=0.0))
    for name in ("decomposer", "discriminator"):
        old, new = (dict(getattr(own, name).named_parameters()) for own in (before, players))
        moved = torch.cat([(new[key] - value).abs().flatten() for key, value in old.items()])
        assert moved.max() <= 1.001e-4  # Adam's first step is the learning rate, wherever there is a gradient
        assert (moved > 0.9e-4).float().mean() > 0.5
    assert all(parameter.requires_grad for parameter in players.discriminator.parameters())
    assert not any(parameter.requires_grad for parameter in players.average.parameters())
    # The generator's step lowers its loss against the new discriminator, on the very batch.
    run = training._Training(players, *data, Options(steps=1, batch_size=4), None, {})
    x, _, target = run._batch(0)
    losses = [
        generator_loss(players.discriminator(net(x, target), target)).item()
        for net in (before.decomposer, players.decomposer)
    ]
    assert losses[1] < losses[0]


def test_train_reports_the_losses_of_its_first_batch(data):
    players = make_players("gaussian")
    run = training._Training(players, *data, OPTIONS, None, {})
    x, source, target = run._batch(0)
    assert torch.equal(run._batch(0)[0], x)
    assert not torch.equal(run._batch(1)[0], x)
    judge = players.discriminator
    real, fake = judge(x, source), judge(players.decomposer(x, target), target)
    expected = discriminator_loss(real, fake).item()
    history = train(make_players("gaussian"), *data, options=Options(steps=1, batch_size=4, report_steps=1))
    (entry,) = history.entries
    assert entry["discriminator"] == pytest.approx(expected, rel=1e-5)
    assert entry["real"] == pytest.approx(real.mean().item(), rel=1e-4, abs=1e-6)
    assert (history.steps, history.ended_by) == (1, "steps")


@pytest.mark.parametrize("smoother", ["gaussian", "learnt"])
@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_train_in_parts_has_the_gradients_of_whole_batches(data, smoother, accumulation, monkeypatch):
    update, gradients = training._Training._update, []

    def keep(self, player):
        own = (self.players.discriminator, self.players.decomposer)[player]
        gradients[-1].append(torch.cat([parameter.grad.flatten() for parameter in own.parameters()]))
        update(self, player)

    monkeypatch.setattr(training._Training, "_update", keep)
    for number in (1, accumulation):
        players = make_players(smoother)
        with torch.no_grad():  # bands that are not nearly 0, hence not mostly rounding
            for parameter in players.decomposer.smoother.parameters():
                parameter.mul_(1.3)
        gradients.append([])
        train(players, *data, options=Options(steps=1, batch_size=4, accumulation=number, report_steps=1))
    for whole, parts in zip(*gradients, strict=True):
        assert (whole - parts).norm() < 2e-3 * whole.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_train_in_16_bits_is_close(data, precision):
    full, half = (
        train(make_players(), *data, options=Options(steps=3, batch_size=4, report_steps=3, precision=name))
        for name in ("fp32", precision)
    )
    assert half.entries[0]["discriminator"] == pytest.approx(full.entries[0]["discriminator"], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_killed_at_any_step_ends_the_same(data, tmp_path, precision, monkeypatch):
    options = Options(steps=5, batch_size=4, accumulation=2, report_steps=2, precision=precision, save_seconds=0)
    whole = make_players()
    history = train(whole, *data, options=options)
    step = training._Training._step

    for last in (1, 2, 4):

        def killed(self, *batch, last=last):
            if self.history.steps == last + 1:
                raise KeyboardInterrupt
            return step(self, *batch)

        file = tmp_path / f"{last}.pt"
        monkeypatch.setattr(training._Training, "_step", killed)
        if last < 4:
            with pytest.raises(KeyboardInterrupt):
                train(make_players(), *data, options=options, checkpoint=file)
        else:
            train(make_players(), *data, options=options, checkpoint=file)
        monkeypatch.setattr(training._Training, "_step", step)
        resumed = make_players()
        again = train(resumed, *data, options=options, checkpoint=file)
        assert same(whole, resumed)
        assert len(again.entries) == 3
        for one, other in zip(history.entries, again.entries, strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_train_saves_when_asked_to_stop(data, tmp_path):
    file = tmp_path / "checkpoint.pt"
    asked = []

    def observe(step):
        asked.append(step)
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Stopped, match="training stopped at step 2 of 4"):
        train(make_players(), *data, options=OPTIONS, checkpoint=file, observe=observe)
    history = train(make_players(), *data, options=OPTIONS, checkpoint=file, observe=lambda _: {"seen": 1.0})
    assert (asked, history.steps) == ([2], 4)
    assert history.entries[1]["seen"] == 1.0


def test_train_ends_at_its_time_limit(data, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    history = train(make_players(), *data, options=Options(steps=100, batch_size=4, time_limit=20.0))
    assert history.ended_by == "time limit"
    assert 0 < history.steps < 20


def test_train_stops_at_nan_and_names_the_checkpoint(data, tmp_path):
    file = tmp_path / "checkpoint.pt"
    train(make_players(), *data, options=OPTIONS, checkpoint=file)
    players = make_players()
    with torch.no_grad():
        next(players.discriminator.parameters()).fill_(math.nan)
    with pytest.raises(
        RuntimeError, match=r"the losses must stay finite, got .*nan.* at step 0; there is no checkpoint"
    ):
        train(players, *data, options=OPTIONS, checkpoint=tmp_path / "other.pt")
    with pytest.raises(ValueError, match="belongs to another training"):
        train(make_players(), *data, options=Options(steps=4, batch_size=3, report_steps=2), checkpoint=file)


def test_train_never_saves_moments_that_are_not_finite(data, tmp_path):
    run = training._Training(make_players("gaussian"), *data, OPTIONS, tmp_path / "checkpoint.pt", {})
    next(run.steps())
    next(iter(run.optimizers[0].state.values()))["exp_avg_sq"].fill_(math.inf)
    with pytest.raises(RuntimeError, match="must stay finite, and are not after step 1; there is no checkpoint yet"):
        run._save(force=True)
    assert not run.checkpoint.exists()


def test_train_clips_the_smoothers_gradient_only(data, monkeypatch):
    norms = []
    clip = nn.utils.clip_grad_norm_

    def spy(parameters, most):
        norms.append((sum(parameter.numel() for parameter in parameters), most))
        return clip(parameters, most)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    train(make_players(), *data, options=OPTIONS)
    assert norms == [(40_464, 1.0)] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images[:3], labels), "images and labels must be as many, got 3 and 12"),
        (lambda images, labels: (images, labels.clamp(max=1)), r"labels must be all of 0 to 2, got \[0, 1\], none of"),
        (lambda images, labels: (images, labels + 1), r"labels must be all of 0 to 2, got \[1, 2, 3\]"),
    ],
)
def test_train_refuses_labels(data, change, message):
    with pytest.raises(ValueError, match=message):
        train(make_players("gaussian"), *change(*data), options=OPTIONS)


def test_train_refuses_more_parts_than_images(data):
    with pytest.raises(ValueError, match="accumulation must be in 1 to the batch size 4, got 5"):
        train(make_players("gaussian"), *data, options=Options(steps=1, batch_size=4, accumulation=5))


def test_warm_start_makes_a_smoother(data):
    images, _ = data
    smoother = make_smoother("learnt", image_size=32, bands=2)
    x = to_signal(images)
    before = (smoother(x).R - gaussian_smooth(x, 2.0)).square().mean().item()
    warm_start(smoother, images, steps=40, sigma=2.0, batch_size=6, seed=0)
    after = (smoother(x).R - gaussian_smooth(x, 2.0)).square().mean().item()
    assert after < 0.7 * before
