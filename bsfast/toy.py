"""Toys of the paper: many small branched networks on the line, trained at once on NumPy arrays, without torch."""

import importlib
import importlib.util
import math
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Looked for, not tried: a native module that is there but broken must say so.
_native = os.environ.get("BSFAST_NATIVE") != "0" and importlib.util.find_spec("bsfast._native")
_backend = importlib.import_module("bsfast._native" if _native else "bsfast._toy_numpy")

Init = str | tuple[ArrayLike, ArrayLike]


@dataclass(frozen=True, eq=False)
class Trials:
    """What :func:`train` returns: arrays whose axis 0 is the trial; M branches, J samples.

    Attributes:
        initial_weight: Weights before the first step, shape ``(trials, M)``.
        initial_bias: Biases before the first step, ``(trials, M)``.
        weight: Weights at the stop, ``(trials, M)``.
        bias: Biases at the stop, ``(trials, M)``.
        initial_responses: Branch outputs v_k(x_j) before the first step, ``(trials, M, J)``.
        responses: Branch outputs at the stop, ``(trials, M, J)``.
        error: Sum over samples of (f(x_j) - y_j)² at the stop, ``(trials,)``.
        success: Whether the error is below the tolerance, ``(trials,)``; nowhere if the tolerance is None.
        diverged: Whether the error became infinite or NaN, which stops a trial too, ``(trials,)``.
        steps: Steps of gradient descent done, ``(trials,)``.
        trajectory: Branch outputs at steps 0, s, 2s, ... with s = ``record_steps``, shape
            ``(trials, max_steps // s + 1, M, J)``; after the stop they repeat. None if not asked for.
    """

    initial_weight: NDArray[np.float64]
    initial_bias: NDArray[np.float64]
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    initial_responses: NDArray[np.float64]
    responses: NDArray[np.float64]
    error: NDArray[np.float64]
    success: NDArray[np.bool_]
    diverged: NDArray[np.bool_]
    steps: NDArray[np.int64]
    trajectory: NDArray[np.float64] | None


def train(
    x: ArrayLike,
    y: ArrayLike,
    num_branches: int,
    trials: int,
    lr: float = 0.01,
    slope: float = 0.01,
    max_steps: int = 20000,
    seed: int = 0,
    *,
    init: Init = "uniform",
    tolerance: float | None = 1e-4,
    record_steps: int | None = None,
    isa: str | None = None,
    num_threads: int | None = None,
) -> Trials:
    r"""Train branched one-neuron networks by gradient descent, many random starts at once.

    A trial is :math:`f(x) = \sum_k v_k(x)`, :math:`v_k(x) = \mathrm{LeakyReLU}(w_k x + b_k)`, under the loss
    :math:`\frac12 \sum_j (f(x_j) - y_j)^2`. Equivalent to full-batch ``torch.optim.SGD`` in float64, one model a
    trial. A trial stops at the first step at which its error is below the tolerance. Its result depends on its start
    only: not on the other trials, on the threads or, but for rounding, on the instruction set.

    Args:
        x: Samples, shape ``(J,)``.
        y: Targets, shape ``(J,)``.
        num_branches: M.
        trials: Number of random starts.
        lr: Step size on the loss summed over samples.
        slope: Slope of LeakyReLU below zero, in [0, 1].
        max_steps: Steps after which a trial stops in any case.
        seed: Seed of the random starts; the first trials are the same for every ``trials``.
        init: ``"uniform"``: weights and biases from U(-1, 1), as ``nn.Linear(1, 1)``; ``"normal"``: from N(0, 1); or
            the arrays ``(weight, bias)``, each ``(trials, M)``.
        tolerance: Sum of squared errors below which a trial succeeds and stops. None: all run ``max_steps`` steps.
        record_steps: Number of steps between recorded responses. None: no trajectory.
        isa: Instruction set: ``"baseline"``, ``"avx2"`` or ``"avx512"``. None: the best of this host.
        num_threads: Threads to use. None: one for each available CPU. NumPy, in place of native code, uses one.

    Returns:
        Start, end and outcome of every trial.

    Raises:
        TypeError: If a number or an array is not of its kind.
        ValueError: If an argument is out of range or shapes disagree.

    Source: Brokman & Gilboa (2022), arXiv 2206.05810, Figures 2 to 4.

    Example:
        >>> result = train([-1, 0, 0, 1], [1, 0.5, 0.5, 1], num_branches=10, trials=200)
        >>> bool(result.success.all()), result.responses.shape
        (True, (200, 10, 4))
    """  # noqa: DOC502
    x, y = _vector("x", x), _vector("y", y)
    if x.shape != y.shape:
        raise ValueError(f"train: y must have the shape of x, {x.shape}, got {y.shape}")
    for name, count in (("num_branches", num_branches), ("trials", trials), ("max_steps", max_steps)):
        _check_int(name, count, 1, "a positive int")
    for name, choice in (("record_steps", record_steps), ("num_threads", num_threads)):
        if choice is not None:
            _check_int(name, choice, 1, "None or a positive int")
    _check_int("seed", seed, 0, "a non-negative int")
    _check_number("lr", lr, "a positive number", lambda value: value > 0)
    _check_number("slope", slope, "a number in [0, 1]", lambda value: 0 <= value <= 1)
    if tolerance is not None:
        _check_number("tolerance", tolerance, "None or a positive number", lambda value: value > 0)
    if isa is not None and isa not in (available := instruction_sets()):
        raise ValueError(f"train: isa must be None or one of {', '.join(available)} on this host, got {isa!r}")
    weight, bias = _initial(init, trials, num_branches, seed)
    final: dict[str, NDArray[Any]] = _backend.train_toy(
        x,
        y,
        weight,
        bias,
        lr=lr,
        slope=slope,
        tolerance=-1.0 if tolerance is None else tolerance,
        max_steps=max_steps,
        stride=record_steps or 0,
        isa=isa or "",
        num_threads=num_threads or _available_cpus(),
    )
    return Trials(
        initial_weight=weight,
        initial_bias=bias,
        weight=final["weight"],
        bias=final["bias"],
        initial_responses=_responses(x, weight, bias, slope),
        responses=_responses(x, final["weight"], final["bias"], slope),
        error=final["error"],
        success=final["error"] < (tolerance or 0.0),
        diverged=~np.isfinite(final["error"]),
        steps=final["steps"],
        trajectory=final["trajectory"] if record_steps else None,
    )


def instruction_sets() -> tuple[str, ...]:
    """Names that ``isa`` may have on this host, slowest first; ``("numpy",)`` without native code or if it is off.

    Returns:
        The names.
    """
    best = _backend.instruction_set()
    names = ("baseline", "avx2", "avx512")
    return names[: names.index(best) + 1] if best in names else (best,)


def _responses(
    x: NDArray[np.float64], weight: NDArray[np.float64], bias: NDArray[np.float64], slope: float
) -> NDArray[np.float64]:
    """Branch outputs of each trial, ``(trials, M, J)``."""
    with np.errstate(over="ignore", invalid="ignore"):  # a trial may have diverged
        z = weight[:, :, None] * x + bias[:, :, None]
        return np.where(z > 0, z, slope * z)


def _initial(init: Init, trials: int, num_branches: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights and biases at the start, each ``(trials, M)``, drawn trial by trial."""
    message = f"train: init must be 'uniform', 'normal' or arrays (weight, bias), got {reprlib.repr(init)}"
    if isinstance(init, str):
        generator = np.random.default_rng(seed)
        if init == "uniform":
            start = generator.uniform(-1.0, 1.0, (trials, 2, num_branches))
        elif init == "normal":
            start = generator.standard_normal((trials, 2, num_branches))
        else:
            raise ValueError(message)
        return start[:, 0].copy(), start[:, 1].copy()
    try:
        weight, bias = init
    except (TypeError, ValueError):
        raise TypeError(message) from None
    weight, bias = _floats("init weight", weight), _floats("init bias", bias)
    for name, values in (("weight", weight), ("bias", bias)):
        if values.shape != (trials, num_branches):
            raise ValueError(
                f"train: init {name} must have shape (trials={trials}, M={num_branches}), got {values.shape}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"train: init {name} must be finite, got {values[~np.isfinite(values)][0]}")
    return weight, bias


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Finite float64 values in one axis, at least one."""
    vector = _floats(name, values)
    if vector.ndim != 1 or not vector.size:
        raise ValueError(f"train: {name} must have shape (J,), J at least 1, got {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"train: {name} must be finite, got {vector[~np.isfinite(vector)][0]}")
    return vector


def _floats(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Copy real numbers to a contiguous float64 array; text, objects and complex numbers are none."""
    try:
        return np.asarray(values).astype(np.float64, order="C", casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(f"train: {name} must be an array of real numbers, got {reprlib.repr(values)}") from None


def _check_int(name: str, value: object, least: int, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"train: {name} must be {rule}, got {value!r}")
    if value < least:
        raise ValueError(f"train: {name} must be {rule}, got {value}")


def _check_number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"train: {name} must be {rule}, got {value!r}")
    if not (math.isfinite(value) and holds(float(value))):
        raise ValueError(f"train: {name} must be {rule}, got {value}")


def _available_cpus() -> int:
    """CPUs that this process may use; containers and job schedulers often grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
