"""The classifiers' training loop: schedule, time limit, refusal of NaN, and a resume that changes no bit."""

import itertools
import os
import signal
import time

import pytest
import torch
from torch import nn

from experiments.classifier.training import Options, branch_responses, schedule, train
from experiments.common.augment import normalise
from experiments.common.interrupt import Stopped

SIZE = 6


class Tiny(nn.Module):
    """Two branches with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.branches = nn.ModuleList(nn.Linear(3 * SIZE * SIZE, 4) for _ in range(2))

    def branch_outputs(self, x):
        return torch.stack([branch(self.norm(x).flatten(1)) for branch in self.branches])


def score(outputs, labels):
    """The two branches as two models."""
    losses = [nn.functional.cross_entropy(own, labels) for own in outputs]
    return {"loss": torch.stack(losses), "accuracy": (outputs.argmax(2) == labels).float().mean(1)}


@pytest.fixture
def problem():
    labels = torch.arange(40) % 4
    images = torch.randint(60, (40, 3, SIZE, SIZE), dtype=torch.uint8)
    images[torch.arange(40), labels % 3] += (100 + 40 * (labels // 3)).to(torch.uint8)[:, None, None]
    return images, labels


def new_net():
    torch.manual_seed(5)
    return Tiny()


def options(**changes):
    return Options(**({"epochs": 3, "batch_size": 8, "lr": 0.01, "pad": 1} | changes))


def test_schedule_rises_then_follows_a_cosine():
    values = [schedule(progress, warmup=0.2) for progress in (0, 0.1, 0.2, 0.6, 1)]
    assert values == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert schedule(0.0, warmup=0.0) == 1


def test_train_learns_and_repeats(problem):
    histories = [train(new_net(), score, *problem, options=options(epochs=8, flip=False)) for _ in range(2)]
    first, second = histories
    for model in range(2):
        assert first.course("loss", model)[-1] < 0.5 * first.course("loss", model)[0]
    assert (first.steps, len(first.epochs), first.ended_by) == (40, 8, "epochs")
    assert [entry["steps"] for entry in first.epochs] == list(range(5, 41, 5))
    for name in ("loss", "accuracy"):
        assert first.course(name) == second.course(name)


def test_train_takes_the_steps_of_sgd(problem):
    images, labels = problem
    net, same = new_net(), new_net()
    train(
        net,
        score,
        images[:8],
        labels[:8],
        options=options(epochs=1, pad=0, flip=False, warmup=0, weight_decay=0.5),
    )
    score(same.branch_outputs(normalise(images[:8])), labels[:8])["loss"].sum().backward()
    rate = 0.01 * schedule(0.5, warmup=0)
    for parameter, other in zip(net.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(parameter, other - rate * (other.grad + 0.5 * other))


def test_train_evaluates_and_logs_each_epoch(problem):
    seen = []
    history = train(
        new_net(), score, *problem, options=options(), evaluate=lambda: {"test": [1.0, 2.0]}, log=seen.append
    )
    assert seen == history.epochs
    assert history.course("test", 1) == [2.0] * 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_train_learns_in_16_bits(problem, precision):
    history = train(new_net(), score, *problem, options=options(epochs=8, flip=False, precision=precision))
    assert history.course("loss")[-1] < 0.6 * history.course("loss")[0]


def test_train_stops_at_nan_and_names_step_and_checkpoint(problem, tmp_path):
    calls = itertools.count()

    def spoilt(outputs, labels):
        scores = score(outputs, labels)
        return scores | {"loss": scores["loss"] * (float("nan") if next(calls) == 7 else 1.0)}

    file = tmp_path / "net.pt"
    message = (
        r"loss must stay finite, got nan, nan at step 7 \(epoch 2, learning rate .*; the last good state, of step 7,"
    )
    with pytest.raises(RuntimeError, match=message):
        train(new_net(), spoilt, *problem, options=options(save_seconds=0), checkpoint=file)
    state = torch.load(file, weights_only=True)["state"]
    assert all(value.isfinite().all() for value in state["net"].values())
    with pytest.raises(RuntimeError, match="there is no checkpoint yet"):
        train(new_net(), lambda outputs, _: {"loss": outputs.sum((1, 2)) * float("inf")}, *problem, options=options())


def test_train_never_saves_parameters_that_are_not_finite(problem, tmp_path):
    file = tmp_path / "net.pt"
    chosen = options(lr=1e38, save_seconds=0, warmup=0)
    with pytest.raises(RuntimeError, match="must stay finite"):
        train(new_net(), score, *problem, options=chosen, checkpoint=file)
    if file.exists():
        state = torch.load(file, weights_only=True)["state"]
        assert all(value.isfinite().all() for value in state["net"].values())


def test_train_ends_at_its_time_limit(problem, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    history = train(new_net(), score, *problem, options=options(epochs=100, time_limit=24.0))
    assert history.ended_by == "time limit"
    assert history.steps < 24
    assert history.epochs[-1]["lr"] < 0.3 * 0.01
    assert history.epochs[-1]["steps"] == history.steps


class Killed(BaseException):
    """Ends a training as a kill would: nothing may be done about it."""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_killed_at_any_step_ends_the_same(problem, tmp_path, precision):
    chosen = options(save_seconds=0, precision=precision)
    whole = new_net()
    history = train(whole, score, *problem, options=chosen)
    for step in range(history.steps + 1):
        file, calls = tmp_path / f"{step}.pt", itertools.count()

        def killed(outputs, labels, calls=calls, step=step):
            if next(calls) == step:
                raise Killed
            return score(outputs, labels)

        try:
            train(new_net(), killed, *problem, options=chosen, checkpoint=file)
        except Killed:
            net = new_net()
            resumed = train(net, score, *problem, options=chosen, checkpoint=file)
            assert (resumed.course("loss"), resumed.steps) == (history.course("loss"), history.steps)
            torch.testing.assert_close(dict(net.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
        else:
            assert step == history.steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_saves_when_asked_to_stop(problem, tmp_path, number):
    file, calls = tmp_path / "net.pt", itertools.count()

    def asked(outputs, labels):
        if next(calls) == 6:
            os.kill(os.getpid(), number)
        return score(outputs, labels)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="training stopped at step 7 of 15"):
        train(new_net(), asked, *problem, options=options(), checkpoint=file)
    assert signal.getsignal(number) == before
    nets = [new_net(), new_net()]
    train(nets[0], score, *problem, options=options(), checkpoint=file)
    train(nets[1], score, *problem, options=options())
    torch.testing.assert_close(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=0, atol=0)


def test_train_goes_on_from_a_finished_checkpoint_without_a_step(problem, tmp_path):
    file = tmp_path / "net.pt"
    first = train(new_net(), score, *problem, options=options(), checkpoint=file)
    again = train(new_net(), lambda *_: pytest.fail("a step was taken"), *problem, options=options(), checkpoint=file)
    assert again == first


def test_train_refuses_the_checkpoint_of_other_options(problem, tmp_path):
    file = tmp_path / "net.pt"
    train(new_net(), score, *problem, options=options(), checkpoint=file, identity={"data": "a"})
    with pytest.raises(
        ValueError, match=r"belongs to another training: its training is .*'lr': 0.01.*here it is .*0.02"
    ):
        train(new_net(), score, *problem, options=options(lr=0.02), checkpoint=file, identity={"data": "a"})
    with pytest.raises(ValueError, match="its data is 'a', here it is 'b'"):
        train(new_net(), score, *problem, options=options(), checkpoint=file, identity={"data": "b"})


def test_branch_responses_are_those_of_eval_mode(problem):
    net = new_net().train()
    outputs = branch_responses(net, problem[0], batch_size=16)
    assert net.training
    assert int(net.norm.num_batches_tracked) == 0
    with torch.no_grad():
        torch.testing.assert_close(outputs, net.eval().branch_outputs(normalise(problem[0])))


def test_train_refuses_unequal_numbers(problem):
    with pytest.raises(ValueError, match="images and labels must be as many and at least 1, got 40 and 39"):
        train(new_net(), score, problem[0], problem[1][1:], options=options())
