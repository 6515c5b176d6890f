"""The training loop: schedule, augmentation, budget, checkpoints and the refusal to go on with NaN."""

import itertools

import pytest
import torch
from torch import nn

from experiments.common import training
from experiments.common.training import Options, augment, branch_responses, normalise, schedule, train

SIZE = 6


class Tiny(nn.Module):
    """Two branches with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.branches = nn.ModuleList(nn.Linear(3 * SIZE * SIZE, 4) for _ in range(2))

    def branch_outputs(self, x):
        return torch.stack([branch(self.norm(x).flatten(1)) for branch in self.branches])

    def forward(self, x):
        return self.branch_outputs(x).sum(0)


@pytest.fixture
def net():
    return Tiny()


@pytest.fixture
def problem():
    labels = torch.arange(40) % 4
    images = torch.randint(60, (40, 3, SIZE, SIZE), dtype=torch.uint8)
    images[torch.arange(40), labels % 3] += (100 + 40 * (labels // 3)).to(torch.uint8)[:, None, None]
    return images, labels


def options(**changes):
    return Options(**({"epochs": 3, "batch_size": 8, "lr": 0.01, "pad": 1} | changes))


def test_schedule_rises_then_follows_a_cosine():
    values = [schedule(progress, warmup=0.2) for progress in (0, 0.1, 0.2, 0.6, 1)]
    assert values == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert schedule(0.0, warmup=0.0) == 1


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


def test_train_learns_and_repeats(net, problem):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    histories = []
    for _ in range(2):
        net.load_state_dict(state)
        histories.append(train(net, nn.functional.cross_entropy, *problem, options=options(epochs=8, flip=False)))
    first, second = histories
    assert first.loss[-1] < 0.5 * first.loss[0]
    assert (first.steps, len(first.loss), first.ended_by) == (40, 8, "epochs")
    assert first.loss == second.loss
    assert first.accuracy == second.accuracy


def test_train_takes_the_steps_of_sgd(net, problem):
    images, labels = problem
    same = Tiny()
    same.load_state_dict(net.state_dict())
    train(
        net,
        nn.functional.cross_entropy,
        images[:8],
        labels[:8],
        options=options(epochs=1, pad=0, flip=False, warmup=0, weight_decay=0.5),
    )
    nn.functional.cross_entropy(same(normalise(images[:8])), labels[:8]).backward()
    rate = 0.01 * schedule(0.5, warmup=0)
    for parameter, other in zip(net.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(parameter, other - rate * (other.grad + 0.5 * other))


def test_train_stops_at_nan_and_names_the_step(net, problem):
    calls = itertools.count()

    def loss(f, _labels):
        return f.sum() * (float("nan") if next(calls) == 7 else 1e-3)

    with pytest.raises(RuntimeError, match=r"loss must stay finite, got nan at step 7 \(epoch 1, learning rate"):
        train(net, loss, *problem, options=options())


def test_train_ends_at_its_budget(net, problem, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(clock)))
    history = train(net, nn.functional.cross_entropy, *problem, options=options(epochs=100, budget=12.0))
    assert history.ended_by == "budget"
    assert history.steps < 12
    assert history.lr[-1] < 0.3 * 0.01


def test_train_continues_from_a_checkpoint(problem, tmp_path):
    nets = [Tiny() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    whole = train(nets[0], nn.functional.cross_entropy, *problem, options=options())
    file = tmp_path / "new" / "net.pt"

    def interrupted(f, labels):
        if file.exists():
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(f, labels)

    with pytest.raises(KeyboardInterrupt):
        train(nets[1], interrupted, *problem, options=options(), checkpoint=file)
    resumed = train(Tiny(), nn.functional.cross_entropy, *problem, options=options(), checkpoint=file)
    assert (resumed.loss, resumed.steps) == (whole.loss, whole.steps)
    saved = torch.load(file, weights_only=True)["net"]
    torch.testing.assert_close(saved, dict(nets[0].state_dict()), rtol=0, atol=0)
    assert [entry.name for entry in file.parent.iterdir()] == ["net.pt"]


def test_save_checkpoint_keeps_the_old_file_when_writing_fails(net, tmp_path, monkeypatch):
    file = tmp_path / "net.pt"
    file.write_bytes(b"old")

    def full(_state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(OSError, match="disk full"):
        training.save_checkpoint(file, net, optimizer, torch.Generator(), training.History())
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("net.pt", b"old")]


def test_branch_responses_are_those_of_eval_mode(net, problem):
    images = problem[0]
    net.train()
    outputs = branch_responses(net, images, batch_size=16)
    assert net.training
    assert int(net.norm.num_batches_tracked) == 0
    with torch.no_grad():
        torch.testing.assert_close(outputs, net.eval().branch_outputs(normalise(images)))


def test_train_refuses_unequal_numbers(net, problem):
    with pytest.raises(ValueError, match="images and labels must be as many and at least 1, got 40 and 39"):
        train(net, nn.functional.cross_entropy, problem[0], problem[1][1:], options=options())
