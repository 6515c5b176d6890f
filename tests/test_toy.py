"""bsfast.toy against a plain loop: every instruction set of this host, and NumPy."""

import subprocess
import sys

import numpy as np
import pytest

from bsfast import _toy_numpy, toy

TOYS = {"toy1": ([-1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.5, 1.0]), "toy2": ([-1.0, 0.0, 1.0, 2.0], [1.0, 0.25, 0.5, 0.75])}
TRIALS = 13  # a multiple of no number of lanes
ARRAYS = ("weight", "bias", "error", "steps", "responses", "trajectory")


@pytest.fixture(params=[*dict.fromkeys((*toy.instruction_sets(), "numpy"))])
def isa(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(toy, "_backend", _toy_numpy)
    return request.param


def plain_trajectory(x, y, weight, bias, lr, slope, steps):
    """Responses of one trial at every step, shape (steps + 1, M, J): the definition, branch by branch."""
    weight, bias = list(weight), list(bias)
    trajectory = []
    for _ in range(steps + 1):
        outputs = [[max(w * xj + b, slope * (w * xj + b)) for xj in x] for w, b in zip(weight, bias, strict=True)]
        trajectory.append(outputs)
        residual = [sum(column) - yj for column, yj in zip(zip(*outputs, strict=True), y, strict=True)]
        for k, row in enumerate(outputs):
            gains = [rj * (1.0 if v > 0 else slope) for rj, v in zip(residual, row, strict=True)]
            weight[k] -= lr * sum(g * xj for g, xj in zip(gains, x, strict=True))
            bias[k] -= lr * sum(gains)
    return np.array(trajectory)


def batched_trajectory(x, y, weight, bias, lr, slope, steps):
    """The same for all trials, (trials, steps + 1, M, J)."""
    x, y = np.array(x), np.array(y)
    trajectory = []
    for _ in range(steps + 1):
        z = weight[..., None] * x + bias[..., None]
        trajectory.append(np.maximum(z, slope * z))
        gradient = (trajectory[-1].sum(axis=1) - y)[:, None] * np.where(z > 0, 1.0, slope)
        weight = weight - lr * np.einsum("tmj,j->tm", gradient, x)
        bias = bias - lr * gradient.sum(axis=2)
    return np.stack(trajectory, axis=1)


def test_batched_trajectory_equals_plain():
    result = toy.train(*TOYS["toy2"], 3, 2)
    start = result.initial_weight, result.initial_bias
    expected = [plain_trajectory(*TOYS["toy2"], w, b, 0.05, 0.01, 200) for w, b in zip(*start, strict=True)]
    np.testing.assert_allclose(batched_trajectory(*TOYS["toy2"], *start, 0.05, 0.01, 200), expected, atol=1e-12)


@pytest.mark.parametrize("num_branches", [2, 3, 7, 30])
@pytest.mark.parametrize("name", TOYS)
def test_train_follows_plain_loop(isa, name, num_branches):
    x, y = TOYS[name]
    result = toy.train(x, y, num_branches, TRIALS, 0.01, max_steps=2000, tolerance=None, record_steps=50, isa=isa)
    start = result.initial_weight, result.initial_bias
    expected = batched_trajectory(x, y, *start, 0.01, 0.01, 2000)
    np.testing.assert_allclose(result.trajectory, expected[:, ::50], rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.initial_responses, expected[:, 0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(result.responses, expected[:, -1], rtol=0, atol=1e-9)
    squares = ((expected[:, -1].sum(axis=1) - y) ** 2).sum(axis=1)
    np.testing.assert_allclose(result.error, squares, rtol=0, atol=1e-9)
    assert (result.steps == 2000).all()
    assert not result.success.any()


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 9])
def test_train_follows_plain_loop_for_any_number_of_samples(isa, samples):
    x = np.linspace(-1, 2, samples)
    result = toy.train(x, x**2, 4, TRIALS, 0.01, slope=0.1, max_steps=500, tolerance=None, isa=isa)
    expected = batched_trajectory(x, x**2, result.initial_weight, result.initial_bias, 0.01, 0.1, 500)
    np.testing.assert_allclose(result.responses, expected[:, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 7])
def test_train_stops_each_trial_at_its_first_success(isa, stride):
    x, y = TOYS["toy1"]
    result = toy.train(x, y, 3, TRIALS, 0.05, max_steps=400, record_steps=stride, isa=isa)
    start = result.initial_weight, result.initial_bias
    full = batched_trajectory(x, y, *start, 0.05, 0.01, 400)
    below = ((full.sum(axis=2) - y) ** 2).sum(axis=2) < 1e-4
    steps = np.where(below.any(axis=1), below.argmax(axis=1), 400)
    assert len(set(steps)) > 2
    assert 0 < below.any(axis=1).sum() < TRIALS
    np.testing.assert_array_equal(result.steps, steps)
    np.testing.assert_array_equal(result.success, below.any(axis=1))
    rows = np.minimum(np.arange(0, 401, stride), steps[:, None])
    frozen = full[np.arange(TRIALS)[:, None], rows]
    np.testing.assert_allclose(result.trajectory, frozen, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.responses, full[np.arange(TRIALS), steps], rtol=0, atol=1e-9)


def test_train_ends_trials_that_never_converge_where_all_steps_lead(isa):
    runs = [
        toy.train(*TOYS["toy2"], 2, 50, 0.05, max_steps=6007, record_steps=stride, isa=isa) for stride in (None, 6007)
    ]
    assert runs[0].success.mean() < 0.8
    for name in ("weight", "bias", "error", "steps"):
        np.testing.assert_array_equal(getattr(runs[0], name), getattr(runs[1], name))


def test_train_stops_at_once_when_the_start_succeeds(isa):
    result = toy.train([-1, 1], [1, 1], 2, 1, slope=0, init=([[1, -1]], [[0, 0]]), isa=isa)
    assert (result.steps[0], result.error[0], result.success[0]) == (0, 0.0, True)


def test_train_stops_a_trial_that_diverges(isa):
    x, y = TOYS["toy1"]
    result = toy.train(x, y, 30, TRIALS, 5.0, slope=1.0, max_steps=5000, record_steps=1000, isa=isa)
    assert result.diverged.all()
    assert not result.success.any()
    with np.errstate(over="ignore", invalid="ignore"):
        full = batched_trajectory(x, y, result.initial_weight, result.initial_bias, 5.0, 1.0, 200)
        squares = ((full.sum(axis=2) - y) ** 2).sum(axis=2)
    np.testing.assert_array_equal(result.steps, (~np.isfinite(squares)).argmax(axis=1))


def test_train_is_the_same_on_any_number_of_threads(isa):
    runs = [
        toy.train(*TOYS["toy1"], 3, 101, 0.05, max_steps=999, record_steps=9, isa=isa, num_threads=t) for t in (1, 2, 5)
    ]
    for run in runs[1:]:
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(run, name), getattr(runs[0], name), strict=True)


@pytest.mark.parametrize("k", [0, 5, TRIALS - 1])
def test_train_does_not_let_trials_touch_each_other(isa, k):
    batch = toy.train(*TOYS["toy2"], 6, TRIALS, 0.05, max_steps=3000, record_steps=10, isa=isa)
    start = batch.initial_weight[k : k + 1], batch.initial_bias[k : k + 1]
    alone = toy.train(*TOYS["toy2"], 6, 1, 0.05, max_steps=3000, record_steps=10, isa=isa, init=start)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(batch, name)[k])


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_train_draws_trial_by_trial_from_the_seed(init):
    short, long, other = (
        toy.train([0], [1], 4, trials, max_steps=1, seed=seed, init=init)
        for trials, seed in ((50, 3), (99, 3), (50, 4))
    )
    np.testing.assert_array_equal(short.initial_weight, long.initial_weight[:50])
    np.testing.assert_array_equal(short.initial_bias, long.initial_bias[:50])
    assert (short.initial_weight != other.initial_weight).all()
    values = np.concatenate([long.initial_weight, long.initial_bias])
    assert values.std() == pytest.approx(1 if init == "normal" else 3**-0.5, rel=0.1)  # 4.4 sigma of 792 values
    assert (abs(values).max() > 1) == (init == "normal")


def test_train_leaves_its_input_alone(isa):
    start = np.ones((1, 2)), np.zeros((1, 2))
    result = toy.train(*TOYS["toy1"], 2, 1, init=start, max_steps=5, isa=isa)
    np.testing.assert_array_equal(start, (np.ones((1, 2)), np.zeros((1, 2))))
    np.testing.assert_array_equal(result.initial_weight, start[0])
    assert not np.shares_memory(result.initial_weight, start[0])
    assert (result.weight != start[0]).all()


# Success rates of 1000 float32 trials by batched torch, other seeds: (toy, lr, M, rate).
@pytest.mark.parametrize(
    ("name", "lr", "num_branches", "rate"),
    [("toy1", 0.05, 2, 0.528), ("toy1", 0.01, 4, 0.935), ("toy2", 0.05, 4, 0.905), ("toy2", 0.01, 10, 0.997)],
)
def test_train_succeeds_as_often_as_torch(name, lr, num_branches, rate):
    success = toy.train(*TOYS[name], num_branches, 1000, lr, seed=1).success.mean()
    assert abs(success - rate) < 4 * (2 * rate * (1 - rate) / 1000) ** 0.5  # two binomial samples


def test_toy_needs_no_torch():
    code = "import sys, bsfast.toy; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_toy_runs_on_numpy_when_native_code_is_switched_off(monkeypatch):
    monkeypatch.setenv("BSFAST_NATIVE", "0")
    code = "import bsfast.toy; print(*bsfast.toy.instruction_sets())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "numpy\n"


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"num_branches": 0}, "train: num_branches must be a positive int, got 0"),
        (TypeError, {"num_branches": 2.5}, "train: num_branches must be a positive int, got 2.5"),
        (TypeError, {"trials": True}, "train: trials must be a positive int, got True"),
        (ValueError, {"max_steps": -1}, "train: max_steps must be a positive int, got -1"),
        (ValueError, {"record_steps": 0}, "train: record_steps must be None or a positive int, got 0"),
        (ValueError, {"num_threads": 0}, "train: num_threads must be None or a positive int, got 0"),
        (ValueError, {"seed": -1}, "train: seed must be a non-negative int, got -1"),
        (ValueError, {"lr": 0}, "train: lr must be a positive number, got 0"),
        (ValueError, {"lr": float("nan")}, "train: lr must be a positive number, got nan"),
        (TypeError, {"lr": "0.1"}, "train: lr must be a positive number, got '0.1'"),
        (ValueError, {"slope": 1.5}, r"train: slope must be a number in \[0, 1\], got 1.5"),
        (ValueError, {"tolerance": 0.0}, "train: tolerance must be None or a positive number, got 0.0"),
        (ValueError, {"x": [[0.0]]}, r"train: x must have shape \(J,\), J at least 1, got \(1, 1\)"),
        (ValueError, {"y": []}, r"train: y must have shape \(J,\), J at least 1, got \(0,\)"),
        (ValueError, {"y": [1.0]}, r"train: y must have the shape of x, \(4,\), got \(1,\)"),
        (TypeError, {"x": ["a"]}, r"train: x must be an array of real numbers, got \['a'\]"),
        (TypeError, {"x": None}, "train: x must be an array of real numbers, got None"),
        (TypeError, {"x": [[0], [1, 2]]}, r"train: x must be an array of real numbers, got \[\[0\], \[1, 2\]\]"),
        (TypeError, {"y": np.ones(4) * 1j}, r"train: y must be an array of real numbers, got array\(\[.*\]\)"),
        (ValueError, {"x": [0, 1, np.inf, 2]}, "train: x must be finite, got inf"),
        (
            ValueError,
            {"init": "zeros"},
            r"train: init must be 'uniform', 'normal' or arrays \(weight, bias\), got 'zeros'",
        ),
        (TypeError, {"init": None}, r"train: init must be 'uniform', 'normal' or arrays \(weight, bias\), got None"),
        (
            TypeError,
            {"init": ([1.0],)},
            r"train: init must be 'uniform', 'normal' or arrays \(weight, bias\), got \(\[1.0\],\)",
        ),
        (
            TypeError,
            {"init": (np.ones((3, 2)), [["a"]])},
            r"train: init bias must be an array of real numbers, got \[\['a'\]\]",
        ),
        (
            ValueError,
            {"init": (np.ones((3, 2)), np.ones((3, 1)))},
            r"train: init bias must have shape \(trials=3, M=2\), got \(3, 1\)",
        ),
        (ValueError, {"init": (np.ones((3, 2)), np.full((3, 2), np.nan))}, "train: init bias must be finite, got nan"),
        (ValueError, {"isa": "sse9"}, r"train: isa must be None or one of (\w+, )*\w+ on this host, got 'sse9'"),
    ],
)
def test_train_refuses(error, change, message):
    arguments = {"x": TOYS["toy1"][0], "y": TOYS["toy1"][1], "num_branches": 2, "trials": 3} | change
    with pytest.raises(error, match=f"^{message}$"):
        toy.train(**arguments)
