"""Convolutions of M branches and their gradients on a GPU: own kernels and all stock ways, next to the roofline."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsfast import ops
from tests.cases import ConvCase, in_order
from tests.gpu.machine import Timer, add_rates, graphed, least_ms, refusal
from tests.tolerance import tolerance

WIDTHS = ((8, 32), (16, 16), (32, 8), (32, 4), (6, 32), (12, 16), (24, 8), (48, 4))  # channels, pixels along an axis


def cases(branches: int, samples: int) -> list[ConvCase]:
    """The 3x3 convolutions of the classifier's stages, of both widths, and a strided one with its shortcut."""
    same = [ConvCase(branches, samples, c, c, (size, size), padding=(1, 1)) for c, size in WIDTHS]
    strided = ConvCase(branches, samples, 8, 16, (32, 32), stride=(2, 2), padding=(1, 1))
    return [*same, strided, ConvCase(branches, samples, 8, 16, (32, 32), (1, 1), stride=(2, 2))]


def measure(case: ConvCase, name: str, dtype: torch.dtype, timer: Timer, peaks: dict[str, float]) -> dict[str, Any]:
    """Check all ways of one work against float64 and time them.

    Args:
        case: The convolution.
        name: Of :data:`tests.cases.TRIPLE`.
        dtype: Of the operands.
        timer: Of the device.
        peaks: Limits of the device.

    Returns:
        Times, rates, and the least time that memory and arithmetic allow.
    """
    works, moved = contestants(case, name, dtype, timer.device)
    truth = torch.stack(works["loop"](torch.float64))
    errors = {}
    for way, work in works.items():
        result = work()
        result = torch.stack(result) if isinstance(result, list) else result
        error = torch.linalg.vector_norm(result.double() - truth) / torch.linalg.vector_norm(truth)
        errors[way] = float(f"{error.item():.2g}")
        if way == "bsfast" and not errors[way] <= 4 * tolerance(dtype, case.sum_length):
            raise ValueError(f"{name}-{case} in {dtype} must equal the loop, got a relative error of {errors[way]}")
    _, _, out_channels, height, width = case.out_shape
    products = case.branches * case.samples * out_channels * height * width
    gflop = 2e-9 * products * (case.in_channels // case.groups) * case.kernel[0] * case.kernel[1]
    floor = least_ms(gflop, moved, dtype, peaks)
    results = timer.run(works)
    graphs, refused = {}, {}  # only now, for a capture that is refused can spoil what follows
    for way, work in works.items():
        try:
            graphs[f"{way}, CUDA graph"] = graphed(work, timer.device)
        except RuntimeError as error:
            refused[f"{way}, CUDA graph"] = refusal(error)
    results |= timer.run(graphs) | refused
    add_rates(results, gflop, moved, floor)
    return {"gflop": round(gflop, 3), "mb": round(1e-6 * moved, 1), "floor_ms": round(floor, 4), "errors": errors} | {
        "results": results
    }


def contestants(
    case: ConvCase, name: str, dtype: torch.dtype, device: str
) -> tuple[dict[str, Callable[..., Any]], int]:
    """The same work in several ways, each with operands in the memory order it likes, and the bytes it must move."""
    x, weight, grad = (t.to(device) for t in (case.x(dtype), case.weight(dtype), case.grad(dtype)))
    geometry = (case.stride, case.padding, case.dilation)

    def stock(x: Tensor, weight: Tensor, grad: Tensor, groups: int) -> Tensor:
        if name == "conv2d":
            return F.conv2d(x, weight, None, *geometry, groups)
        mask = (name == "conv2d_input_grad", name == "conv2d_weight_grad", False)
        backward = torch.ops.aten.convolution_backward
        return backward(grad, x, weight, None, *geometry, False, (0, 0), groups, mask)[mask.index(True)]

    def loop(*operands: Tensor, dtype: torch.dtype = dtype) -> list[Tensor]:
        pairs = zip(*(t.to(dtype) for t in operands), strict=True)
        return [stock(*of_branch, groups=case.groups) for of_branch in pairs]

    def merged(t: Tensor) -> Tensor:
        return t.transpose(0, 1).flatten(1, 2).contiguous()

    def split(t: Tensor) -> Tensor:
        if name == "conv2d_weight_grad":
            return t.unflatten(0, (case.branches, -1))
        return t.unflatten(1, (case.branches, -1)).transpose(0, 1)

    own_x, own_grad = in_order(x, "batch_last"), in_order(grad, "batch_last")
    own: dict[str, Callable[[], Tensor]] = {
        "conv2d": lambda: ops.conv2d(own_x, weight, **case.geometry),
        "conv2d_input_grad": lambda: ops.conv2d_input_grad(own_grad, weight, case.x_shape, **case.geometry),
        "conv2d_weight_grad": lambda: ops.conv2d_weight_grad(own_x, own_grad, case.kernel, **case.geometry),
    }
    last = [in_order(t, "channels_last") for t in (x, weight, grad)]
    wide = [merged(x), weight.flatten(0, 1), merged(grad)]
    wide_last = [t.contiguous(memory_format=torch.channels_last) for t in wide]
    groups = case.branches * case.groups
    works: dict[str, Callable[..., Any]] = {
        "bsfast": own[name],
        "loop": lambda dtype=dtype: loop(x, weight, grad, dtype=dtype),
        "loop, channels_last": lambda: loop(*last),
        "grouped": lambda: split(stock(*wide, groups=groups)),
        "grouped, channels_last": lambda: split(stock(*wide_last, groups=groups)),
    }
    return works, x.nbytes + weight.nbytes + grad.nbytes
