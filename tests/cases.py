"""One table of odd convolutions: shapes, settings and memory orders on which all must agree with a plain loop."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

Pair = tuple[int, int]
TRIPLE = ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")


@dataclass(frozen=True)
class ConvCase:
    """A convolution of M branches.

    ``order`` is the memory order of the activations: contiguous, batch_last ([M][C][H][W][N]), channels_last
    ([M][N][H][W][C]), strided (every axis reversed and every second element) or expanded (all branches one memory).
    """

    branches: int
    samples: int
    in_channels: int
    out_channels: int
    size: Pair
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    shared: bool = False
    order: str = "contiguous"

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def x_shape(self) -> tuple[int, ...]:
        shape = (self.samples, self.in_channels, *self.size)
        return shape if self.shared else (self.branches, *shape)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.branches, self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.loop(torch.empty(self.x_shape), torch.empty(self.weight_shape)).shape)

    @property
    def sum_length(self) -> int:
        """Longest sum in the convolution or one of its gradients."""
        taps = self.kernel[0] * self.kernel[1]
        pixels = self.samples * self.size[0] * self.size[1]
        return max(taps * self.in_channels, taps * self.out_channels * self.branches, pixels, 1)

    @property
    def own_kernels(self) -> tuple[str, ...]:
        """Operators of the triple that the own kernels compute, on batch-last or contiguous memory."""
        summed = self.shared and (self.groups > 1 or self.order != "batch_last")  # over the branches
        return tuple(name for name in TRIPLE if name != "conv2d_input_grad" or not summed)

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return in_order(torch.randn(self.x_shape, dtype=torch.float64).to(dtype), self.order)

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        weight = torch.randn(self.weight_shape, dtype=torch.float64).to(dtype)
        return in_order(weight, "strided") if self.order == "strided" else weight

    def grad(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return in_order(torch.randn(self.out_shape, dtype=torch.float64).to(dtype), self.order)

    def loop(self, x: Tensor, weight: Tensor) -> Tensor:
        """The truth: one stock convolution a branch."""
        inputs = [x] * len(weight) if x.dim() == 4 else x
        return torch.stack([F.conv2d(x_k, w_k, None, **self.geometry) for x_k, w_k in zip(inputs, weight, strict=True)])

    def loop_grads(self, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """The truth of both gradients: autograd through the loop."""
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(self.loop(x, weight), (x, weight), grad)

    def problem(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Both operands of an operator of the triple, and its true result in float64."""
        x, weight, grad = self.x(dtype), self.weight(dtype), self.grad(dtype)
        if name == "conv2d":
            return x, weight, self.loop(x.double(), weight.double())
        x_grad, weight_grad = self.loop_grads(x.double(), weight.double(), grad.double())
        return (grad, weight, x_grad) if name == "conv2d_input_grad" else (x, grad, weight_grad)

    def __str__(self) -> str:
        parts = [f"M{self.branches}", f"N{self.samples}", f"{self.in_channels}to{self.out_channels}", name(self.size)]
        parts.append(f"k{name(self.kernel)}")
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        parts += [f"{key}{name(getattr(self, key))}" for key, value in defaults.items() if getattr(self, key) != value]
        parts += ["shared"] if self.shared else []
        return "-".join(parts + ([self.order] if self.order != "contiguous" else []))


def name(value: int | Pair) -> str:
    """3 or, of a pair, 3x2."""
    return str(value) if isinstance(value, int) else f"{value[0]}x{value[1]}"


def in_order(t: Tensor, order: str) -> Tensor:
    """Same shape (and values, but for expanded), in a memory order; written without bsfast."""
    if order == "batch_last":
        axes = [0, *range(2, t.dim()), 1] if t.dim() == 5 else [1, 2, 3, 0]
        return t.permute(axes).contiguous().permute([axes.index(axis) for axis in range(t.dim())])
    if order == "channels_last":
        return t.movedim(-3, -1).contiguous().movedim(-1, -3)
    if order == "strided":
        reverse = tuple(reversed(range(t.dim())))
        wide = t.permute(reverse).repeat_interleave(2, -1)
        return wide[..., ::2].permute(reverse)
    if order == "expanded":
        return t[:1].expand_as(t)
    return t


CONV = [
    ConvCase(1, 1, 1, 1, (1, 1), (1, 1)),
    ConvCase(1, 2, 1, 2, (4, 3), padding=(1, 1), order="batch_last"),
    ConvCase(2, 2, 2, 1, (3, 4), padding=(0, 2), order="batch_last"),
    ConvCase(2, 3, 2, 3, (3, 3), padding=(1, 0), shared=True, order="batch_last"),
    ConvCase(2, 3, 1, 2, (1, 2), padding=(1, 1), order="batch_last"),
    ConvCase(2, 2, 1, 2, (2, 1), padding=(3, 4), order="batch_last"),
    ConvCase(3, 17, 3, 5, (7, 5), padding=(1, 1), order="batch_last"),
    ConvCase(2, 33, 5, 9, (6, 4), padding=(2, 1), order="batch_last"),
    ConvCase(16, 16, 3, 8, (5, 5), padding=(1, 1), order="batch_last"),
    ConvCase(3, 8, 9, 17, (4, 9), order="batch_last"),
    ConvCase(1, 33, 66, 4, (3, 34), padding=(1, 1), order="batch_last"),  # one lane block at a time fits the scratch
    ConvCase(2, 19, 3, 4, (5, 6), padding=(1, 1), shared=True, order="batch_last"),
    ConvCase(2, 3, 2, 3, (4, 5), (1, 1), order="batch_last"),
    ConvCase(2, 3, 2, 2, (5, 4), stride=(2, 2), padding=(1, 1), order="batch_last"),
    ConvCase(2, 3, 2, 2, (5, 6), padding=(1, 1), dilation=(2, 2), order="batch_last"),
    ConvCase(2, 3, 4, 2, (3, 4), padding=(1, 1), groups=2, order="batch_last"),
    ConvCase(2, 5, 3, 2, (6, 7), (2, 5), stride=(3, 2), padding=(1, 4), order="batch_last"),
    ConvCase(2, 18, 2, 4, (5, 4), (1, 1), stride=(2, 3), order="batch_last"),  # no output reads most pixels
    ConvCase(1, 20, 2, 7, (7, 8), (3, 3), stride=(2, 2), padding=(2, 1), dilation=(2, 2), order="batch_last"),
    ConvCase(2, 3, 2, 3, (8, 9), (3, 3), stride=(2, 3), padding=(4, 2), dilation=(3, 2), order="batch_last"),
    ConvCase(2, 9, 2, 3, (3, 9), (5, 4), stride=(2, 1), padding=(3, 2), shared=True, order="batch_last"),
    ConvCase(2, 4, 6, 4, (5, 6), (3, 2), (2, 1), (1, 1), (1, 3), groups=2, shared=True, order="batch_last"),
    ConvCase(2, 17, 4, 4, (4, 5), padding=(1, 1), groups=4, order="batch_last"),  # depthwise
    ConvCase(2, 1, 2, 3, (4, 3), padding=(1, 1)),
    ConvCase(2, 0, 2, 3, (4, 3), padding=(1, 1)),
    ConvCase(2, 0, 2, 3, (4, 3), padding=(1, 1), shared=True, order="batch_last"),
    ConvCase(3, 2, 2, 2, (4, 3), (3, 3), padding=(1, 1)),
    ConvCase(2, 2, 1, 2, (6, 5), stride=(2, 2)),  # the last row of the image is never read
    ConvCase(2, 2, 2, 1, (5, 4), stride=(2, 1), padding=(1, 2)),
    ConvCase(2, 2, 2, 1, (5, 3), (5, 3), padding=(2, 1)),
    ConvCase(2, 2, 1, 2, (4, 7), (2, 3), padding=(0, 1), dilation=(1, 2)),
    ConvCase(2, 2, 4, 6, (3, 3), padding=(1, 1), groups=2),
    ConvCase(2, 2, 4, 6, (3, 3), padding=(1, 1), groups=2, shared=True),
    ConvCase(3, 2, 3, 3, (3, 4), padding=(1, 1), groups=3, order="strided"),  # depthwise
    ConvCase(2, 2, 2, 3, (4, 3), (1, 1), shared=True, order="channels_last"),
    ConvCase(2, 3, 2, 3, (4, 3), (3, 3), padding=(1, 1), order="strided"),
    ConvCase(3, 2, 2, 2, (3, 3), padding=(1, 1), order="expanded"),
    ConvCase(2, 3, 2, 3, (5, 3), stride=(2, 2), padding=(0, 1), order="channels_last"),
]
SMALL_CONV = [case for case in CONV if case.samples * case.in_channels * case.out_channels <= 24 and case.samples > 0]
# What the plan gives to the own kernels; of the input gradients only those among own_kernels.
NATIVE_CONV = [case for case in CONV if case.order == "batch_last" and case.samples > 1]
# One of each kind, for what is slow to check: native, native with a shared input, stock with every setting at once.
FEW_CONV = [
    ConvCase(2, 3, 2, 3, (4, 3), padding=(1, 1), order="batch_last"),
    ConvCase(2, 3, 2, 3, (3, 4), padding=(1, 1), shared=True, order="batch_last"),
    ConvCase(2, 2, 4, 2, (5, 4), (2, 3), stride=(2, 1), padding=(0, 1), groups=2),
    replace(ConvCase(2, 2, 2, 4, (4, 4), (2, 2), dilation=(1, 2), groups=2), shared=True),
]


@st.composite
def conv_cases(draw: st.DrawFn, **fixed: Any) -> ConvCase:
    """Convolutions whose sizes and settings have nothing to do with each other, but for those that are fixed."""
    pick = {
        "branches": st.sampled_from([1, 2, 3, 5]),
        "samples": st.sampled_from([1, 2, 5, 15, 16, 17, 33, 48, 70]),
        "groups": st.sampled_from([1, 1, 1, 2, 3]),
        "size": st.tuples(st.integers(1, 11), st.integers(1, 17)),
        "kernel": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 4), st.integers(0, 4)),
        "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "shared": st.booleans(),
        "order": st.sampled_from(["batch_last", "contiguous"]),
    }
    drawn = {name: fixed[name] if name in fixed else draw(strategy) for name, strategy in pick.items()}
    channels = [drawn["groups"] * draw(st.integers(1, most)) for most in (9, 17)]
    case = ConvCase(in_channels=channels[0], out_channels=channels[1], **drawn)
    axes = zip(case.size, case.kernel, case.padding, case.dilation, strict=True)
    assume(all(length + 2 * pad > dilate * (taps - 1) for length, taps, pad, dilate in axes))
    return case
