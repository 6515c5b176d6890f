"""Training and running M branches on a GPU: bsfast and all stock ways, eager and as CUDA graphs, next to a roofline."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.contestants import COMPILED, CONTESTANTS, LAST, MERGED, OWN, TILES, Contestant
from tests.benchmarks.network_case import NetworkCase
from tests.gpu.machine import Timer, add_rates, attempt, graphed, least_ms

VMAP = "torch.func.vmap"
# What CUDA may refuse to capture comes last, after the compiled loop too: that can leave torch's allocator of no use.
WAYS = (*(name for name in CONTESTANTS if name not in {TILES, VMAP}), MERGED, f"{MERGED}{LAST}", VMAP)
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # outputs, as a part of the largest


def measure(
    case: NetworkCase, phase: str, dtype: torch.dtype, timer: Timer, peaks: dict[str, float], *, compiled: bool
) -> dict[str, Any]:
    """Time one phase of a network in all ways, and its largest memory.

    Args:
        case: The network.
        phase: ``"forward"`` or ``"step"``.
        dtype: float32, or one of 16 bits by autocast; losses are not scaled, which costs next to nothing.
        timer: Of the device.
        peaks: Limits of the device.
        compiled: Whether the compiled loop takes part, which takes minutes.

    Returns:
        For each way its times and memory; the least time that memory and arithmetic of the convolutions allow.
    """
    names = sorted([*WAYS, *([COMPILED] if compiled else [])], key=lambda name: name == VMAP)
    results: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    for name in names:  # one after the other, for all of them need not fit the memory
        made: list[Callable[[], object]] = []

        def timed(name: str = name, made: list[Callable[[], object]] = made) -> dict[str, Any]:
            outputs[name], work = prepared(name, case, phase, dtype, timer.device)
            made.append(work)
            before = reset_memory(timer.device)
            return timer.run({name: work})[name] | memory(timer.device, before)

        def timed_graph(name: str = name, made: list[Callable[[], object]] = made) -> dict[str, Any]:
            return timer.run({name: graphed(made[0], timer.device)})[name]

        results[name] = timed() if name == OWN else attempt(timed)
        if made:
            results[f"{name}, CUDA graph"] = attempt(timed_graph)
        made.clear()
    if "loop" not in outputs:
        raise ValueError(f"{case.name} needs the loop's result, got {results['loop']['error']}")
    truth = outputs["loop"]
    differences = {name: ((y - truth).abs().max() / truth.abs().max()).item() for name, y in outputs.items()}
    if not differences[OWN] <= AGREE[dtype]:
        raise ValueError(f"{case.name} must equal the loop to {AGREE[dtype]}, got {differences[OWN]:.1e}")
    gflop, moved, floor = least(case, phase, dtype, peaks)
    add_rates(results, gflop, moved, floor)
    ran = {name: values for name, values in results.items() if "error" not in values}
    best = min((values["median_ms"], name) for name, values in ran.items() if not name.startswith(OWN))
    own = min((values["median_ms"], name) for name, values in ran.items() if name.startswith(OWN))
    return {
        "gflop": round(gflop, 3),
        "mb": round(1e-6 * moved, 1),
        "floor_ms": float(f"{floor:.4g}"),
        "best_stock": best[1],
        "times_faster_than_best_stock": round(best[0] / own[0], 3),
        "differences": {name: float(f"{value:.1e}") for name, value in differences.items()},
        "results": results,
    }


def prepared(
    name: str, case: NetworkCase, phase: str, dtype: torch.dtype, device: str
) -> tuple[Tensor, Callable[[], object]]:
    """The outputs of a way, and the work of a phase."""
    with torch.device(device):
        contestant = Contestant(name, case)
    contestant.ready("forward")
    forward = in_dtype(contestant.forward, dtype, device)
    output = forward().float()
    contestant.ready(phase)
    return output, forward if phase == "forward" else training(contestant, dtype)


def in_dtype(work: Callable[[], Tensor], dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Run a work under autocast, unless in float32."""

    def run() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            return work()

    return run


def training(contestant: Contestant, dtype: torch.dtype) -> Callable[[], None]:
    """Return a step of training whose backward is outside autocast, as torch's manual wants it."""
    device = contestant.target.device.type
    forward = in_dtype(lambda: contestant.loss(contestant.net(*contestant.inputs), contestant.target), dtype, device)

    def step() -> None:
        contestant.optimizer.zero_grad(set_to_none=True)
        forward().backward()
        contestant.optimizer.step()

    return step


def reset_memory(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def memory(device: str, before: int) -> dict[str, int]:
    """Largest memory of tensors, and how much of it came with the work, in MiB."""
    if device == "cpu":
        return {}
    peak = torch.cuda.max_memory_allocated()
    return {"peak_mib": round(peak / 2**20), "growth_mib": round((peak - before) / 2**20)}


def least(case: NetworkCase, phase: str, dtype: torch.dtype, peaks: dict[str, float]) -> tuple[float, float, float]:
    """GFLOP, bytes and ms that the convolutions alone need: each reads its input and writes its output, or computes.

    A training step adds both gradients of each, which move and compute as much, but for the first one's input.
    """
    layers = [(gflop, moved, least_ms(gflop, moved, dtype, peaks)) for gflop, moved in convolutions(case, dtype)]
    sums = [sum(column) for column in zip(*layers, strict=True)]
    gflop, moved, ms = sums if phase == "forward" else (3 * s - own for s, own in zip(sums, layers[0], strict=True))
    return gflop, moved, ms


def convolutions(case: NetworkCase, dtype: torch.dtype) -> list[tuple[float, float]]:
    """GFLOP and bytes of each layer's convolutions of all branches, the first layer's first."""
    inputs, _ = case.make_inputs()
    branch = case.make_branch()
    layers: list[tuple[float, float]] = []

    def note(conv: nn.Module, given: Sequence[Tensor], y: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        shared = not layers  # the first layer's input is that of all branches
        taps = conv.kernel_size[0] * conv.kernel_size[1] * conv.in_channels // conv.groups
        moved = y.numel() * case.branches + given[0].numel() * (1 if shared else case.branches)
        layers.append((2e-9 * y.numel() * taps * case.branches, float(moved * dtype.itemsize)))

    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.device("meta"):
        branch.to("meta")(*[x.to("meta") for x in inputs])
    return layers
