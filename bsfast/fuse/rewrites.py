"""Exact rewrites of neighbouring steps: convolutions with pooling or upsampling, done with fewer multiply-adds.

A convolution followed by average pooling is one strided convolution with a larger kernel, the moving average of the
old; a 3x3 convolution of an image enlarged by 2 is a 2x2 convolution of the image itself, with a kernel for each of the
four positions of a pixel; a 1x1 convolution may as well run before the enlarging or after the pooling. The weights are
transformed in the graph, so that derivatives of any order pass through. Results differ by rounding only (an infinite
input may give NaN where it gave an infinity).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsfast.fuse.steps import Ref, Step, refs, renewed
from bsfast.fuse.values import PerBranch
from bsfast.nn import Conv2d, functional

Pair = tuple[int, int]
Run = Callable[[Step, dict[str, Any]], Any]
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_NEAREST = {"nearest", "nearest-exact"}


class Rewrite(NamedTuple):
    """Two steps that are computed in another way.

    Attributes:
        parts: The steps, in order; one is a convolution.
        conv: Which.
        kind: ``"pooled"``, ``"enlarged"`` or ``"swapped"``.
        factor: Pixels of the larger image for one of the smaller, in each direction; () if it depends on the input.
        reason: What is computed instead; for reports.
    """

    parts: tuple[Step, Step]
    conv: int
    kind: str
    factor: tuple[int, ...]
    reason: str

    def fits(self, module: nn.Module, value: Any) -> bool:
        """Whether the rewrite computes what the steps would; where they would fail, they shall say so.

        Args:
            module: The convolution.
            value: The first step's input.

        Returns:
            Whether it does, on this input.
        """
        shared = not isinstance(value, PerBranch)
        x = value if shared else value.tensor
        if type(module) is not Conv2d or not isinstance(x, Tensor) or x.dim() != 5 - shared:
            return False
        own: nn.Conv2d = module.settings  # type: ignore[assignment]
        if x.shape[-3] != own.in_channels or x.dtype != module.weight.dtype or x.numel() == 0:
            return False
        if self.kind == "pooled":
            padding, kernel = _pair(own.padding), _pair(own.kernel_size)
            sizes = zip(x.shape[-2:], padding, kernel, self.factor, strict=True)
            return all(size + 2 * pad - taps + 1 >= window for size, pad, taps, window in sizes)
        height, width = x.shape[-2:]
        if self.kind == "enlarged":  # multiply-adds with a border, and without
            return 16 * (height + 1) * (width + 1) < 36 * height * width
        if not self.factor:  # pooling to a given size
            rows, columns = _pair(self.parts[1].args[1])
            return rows * columns < height * width
        return True

    def compute(self, module: Conv2d, value: Any, run: Run) -> Any:
        """Compute the value of the second step.

        Args:
            module: The convolution.
            value: The first step's input, which :meth:`fits`.
            run: Runs a step on values by name.

        Returns:
            The value.
        """
        first, second = self.parts
        if self.kind == "swapped":
            source = first.args[0].name
            inner = run(replace(second, args=(first.args[0], *second.args[1:])), {source: value})
            return run(replace(first, args=(Ref(second.name), *first.args[1:])), {second.name: inner})
        shared = not isinstance(value, PerBranch)
        x, own = value if shared else value.tensor, module.settings
        assert isinstance(own, nn.Conv2d)  # noqa: S101 (for the type checker)
        if self.kind == "enlarged":
            return PerBranch(conv2d_of_enlarged(x, module.weight, module.bias, own.groups, shared=shared))
        settings = (self.factor, _pair(own.padding), 1, own.groups)
        weight = pooled_weight(module.weight, self.factor)
        return PerBranch(functional.conv2d(x, weight, module.bias, *settings, shared=shared))


def pooled_weight(weight: Tensor, window: Sequence[int]) -> Tensor:
    """Kernel of a convolution followed by average pooling: w'[t] = mean over a of w[t - a], a in the window.

    Args:
        weight: Shape ``(..., kH, kW)``.
        window: pH, pW, which is also the stride of the pooling.

    Returns:
        Shape ``(..., kH + pH - 1, kW + pW - 1)``.
    """
    height, width = window
    shifts = [(b, width - 1 - b, a, height - 1 - a) for a in range(height) for b in range(width)]
    total = F.pad(weight, shifts[0])
    for shift in shifts[1:]:
        total = total + F.pad(weight, shift)
    return total / (height * width)


def conv2d_of_enlarged(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, *, shared: bool) -> Tensor:
    """3x3 convolution (padding 1) of an image enlarged twofold by repeating pixels, from the image itself.

    Args:
        x: Shape ``(M, N, C_in, H, W)``, or ``(N, C_in, H, W)`` if shared.
        weight: Shape ``(M, C_out, C_in / groups, 3, 3)``.
        bias: Shape ``(M, C_out)``.
        groups: Groups inside a branch.
        shared: Whether all branches have one input.

    Returns:
        Shape ``(M, N, C_out, 2*H, 2*W)``.
    """
    height, width = x.shape[-2:]
    by_row = _phases(weight.unflatten(1, (groups, -1)), -2)
    corners = [corner for rows in by_row for corner in _phases(rows, -1)]
    # On the padded image corner (a, b) of pixel (i, j) is the 2x2 window at (i + a, j + b).
    y = functional.conv2d(x, torch.stack(corners, 2).flatten(1, 3), None, 1, 1, 1, groups, shared=shared)
    batch_last = y.movedim(1, -1).unflatten(1, (groups, 4, -1)).unbind(2)
    own = [
        corner[..., a : a + height, b : b + width, :].flatten(1, 2)
        for corner, (a, b) in zip(batch_last, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True)
    ]
    rows = [torch.stack(own[a : a + 2], 4).flatten(3, 4) for a in (0, 2)]
    y = torch.stack(rows, 3).flatten(2, 3).movedim(-1, 1)
    return y if bias is None else y + bias[:, None, :, None, None].to(y.dtype)


def _phases(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Two-tap kernels of the even and the odd pixels of an enlarged axis, whose neighbours are equal in pairs."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)


def rewrite(steps: Sequence[Step], net: nn.Module) -> tuple[Step, ...]:
    """Replace pairs of steps that take fewer multiply-adds together by one step each, at the place of the second.

    Args:
        steps: A program.
        net: Its module tree.

    Returns:
        An equivalent program; its steps with ``op`` ``"rewrite"`` have a :class:`Rewrite` as target.
    """
    users: dict[str, list[Step]] = {step.name: [] for step in steps}
    for step in steps:
        for ref in refs(step):
            users[ref.name].append(step)
    at_second: dict[str, Step] = {}
    gone: set[str] = set()
    for step in steps:
        if step.name in at_second or len(users[step.name]) != 1:
            continue
        after = users[step.name][0]
        found = _match(step, after, net) if after.args and after.args[0] == Ref(step.name) else None
        if found is not None and after.name not in gone:
            at_second[after.name] = replace(after, op="rewrite", target=found, args=step.args[:1], kwargs={})
            gone.add(step.name)
    return tuple(renewed([at_second.get(step.name, step) for step in steps if step.name not in gone]))


def _match(first: Step, second: Step, net: nn.Module) -> Rewrite | None:
    conv = _conv_of(first, net)
    if conv is not None:
        return _before_pool(first, second, conv)
    conv = _conv_of(second, net)
    return _after_upsampling(first, second, conv) if conv is not None else None


def _before_pool(first: Step, second: Step, conv: nn.Conv2d) -> Rewrite | None:
    swapped = "the pooling comes first, and the convolution has fewer pixels"
    if second.target is F.adaptive_avg_pool2d:
        fixed = len(second.args) == 2 and not second.kwargs and _is_pair(second.args[1])
        return Rewrite((first, second), 0, "swapped", (), swapped) if fixed and _is_pointwise(conv) else None
    window, stride = _pooling(second)
    if _is_pointwise(conv):
        return Rewrite((first, second), 0, "swapped", stride, swapped) if max(stride) > 1 else None
    kernel = _pair(conv.kernel_size)
    taps = [k + p - 1 for k, p in zip(kernel, window, strict=True)]
    fewer = taps[0] * taps[1] < kernel[0] * kernel[1] * window[0] * window[1]  # multiply-adds of a pooled pixel
    if not fewer or stride != window or _pair(conv.dilation) != (1, 1):
        return None
    reason = f"with the pooling one {taps[0]}x{taps[1]} convolution of stride {window[0]}x{window[1]}"
    return Rewrite((first, second), 0, "pooled", window, reason)


def _pooling(step: Step) -> tuple[Pair, Pair]:
    """Window and stride of an average pooling without padding; of anything else, those of no pooling."""
    none = ((1, 1), (1, 1))
    if step.op != "call_function" or step.target is not F.avg_pool2d:
        return none
    given = dict(zip(_POOL, step.args, strict=False)) | step.kwargs
    window = given["kernel_size"]
    stride = given.get("stride") or window
    unusual = given.get("ceil_mode") or given.get("divisor_override") is not None
    if unusual or given.get("padding", 0) not in {0, (0, 0)} or not (_is_pair(window) and _is_pair(stride)):
        return none
    return _pair(window), _pair(stride)


def _after_upsampling(first: Step, second: Step, conv: nn.Conv2d) -> Rewrite | None:
    given = first.kwargs
    if first.op != "call_function" or first.target is not F.interpolate or len(first.args) != 1:
        return None
    scale = given.get("scale_factor")
    scales = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
    usual = given.get("mode", "nearest") in _NEAREST and given.get("size") is None
    if not usual or len(scales) != 2 or not all(isinstance(s, (int, float)) and s == int(s) >= 1 for s in scales):
        return None
    factor = (int(scales[0]), int(scales[1]))
    if max(factor) == 1 or not isinstance(first.args[0], Ref):
        return None
    if _is_pointwise(conv):
        reason = "the convolution comes before the enlarging, and has fewer pixels"
        return Rewrite((first, second), 1, "swapped", factor, reason)
    if (factor, _pair(conv.kernel_size), _pair(conv.padding), _pair(conv.dilation)) != ((2, 2), (3, 3), (1, 1), (1, 1)):
        return None
    return Rewrite((first, second), 1, "enlarged", factor, "a 2x2 convolution before the enlarging, for each corner")


def _conv_of(step: Step, net: nn.Module) -> nn.Conv2d | None:
    """Settings of a convolution of stride 1 in zeros."""
    if step.op != "call_module" or not step.target or len(step.args) != 1 or step.kwargs:
        return None
    module = net.get_submodule(step.target)
    if type(module) is not Conv2d or not isinstance(step.args[0], Ref):
        return None
    own: nn.Conv2d = module.settings  # type: ignore[assignment]
    usual = own.padding_mode == "zeros" and not isinstance(own.padding, str) and _pair(own.stride) == (1, 1)
    return own if usual else None


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return _pair(conv.kernel_size) == (1, 1) and _pair(conv.padding) == (0, 0)


def _is_pair(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return len(values) in {1, 2} and all(isinstance(entry, int) for entry in values)


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
