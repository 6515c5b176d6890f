"""Chains on CUDA's kernels, on a GPU or emulated and interpreted: in float32, in 16 bits and under autocast."""

import copy
import os
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bsfast
from bsfast import ops
from bsfast.ops.backend import native_why_not, triton_why_not
from bsfast.reference import ReferenceBranched
from tests.cases import in_order
from tests.fuse.test_chains import ENDS, Block

EMULATED = bool(os.environ.get("BSFAST_EMULATED_LIBRARY") and os.environ.get("BSFAST_TRITON_INTERPRETED"))
DEVICE = "cpu" if EMULATED else "cuda"
WHY_NOT = None if EMULATED else native_why_not("cuda") or triton_why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no CUDA kernels: {WHY_NOT}")


class Residual(nn.Module):
    """A small residual network, with every kind of chain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.convs = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)])
        self.down = nn.ModuleList([nn.Conv2d(6, 10, 3, 2, 1, bias=False), nn.Conv2d(10, 10, 3, padding=1)])
        self.short = nn.Conv2d(6, 10, 1, 2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for channels in (6, 6, 10, 10, 10)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.norms[0](self.convs[0](x)))
        x = F.relu(self.norms[1](self.convs[1](y)) + x)
        y = F.relu(self.norms[2](self.down[0](x)))
        return F.relu(self.norms[3](self.down[1](y)) + self.norms[4](self.short(x))).mean((2, 3))


class Calls(TorchDispatchMode):
    """Collects the own operators that are called, and which tensors are around them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "bsfast" and function._opname.endswith("_out"):
            around = [name for name, value in (kwargs or {}).items() if isinstance(value, Tensor)]
            self.seen |= {f"{function._opname} {name}" for name in ("", *around)}
        return function(*args, **kwargs or {})


def cast(dtype: torch.dtype | None) -> AbstractContextManager[None]:
    return torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None)


def steps(net: nn.Module, x: Tensor, weights: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    """Values in training, in evaluation with and without gradients, and all gradients and running statistics."""
    x, values = x.clone().requires_grad_(), []
    for training in (True, False):
        net.train(training)
        with cast(autocast):
            y = net(x)
        (y.double() * weights).sum().backward()
        values.append(y)
    with torch.no_grad(), cast(autocast):
        values.append(net(x))
    plain = net.branches if isinstance(net, ReferenceBranched) else bsfast.unfuse(net)
    state = [t.flatten() for branch in plain for name, t in branch.state_dict().items() if "running" in name]
    if isinstance(net, ReferenceBranched):
        own = [dict(branch.named_parameters()) for branch in net.branches]
        grads = [torch.stack([branch[name].grad for branch in own]) for name in own[0] if own[0][name].grad is not None]
    else:
        grads = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    gathered = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (state, grads))
    return [t.detach().double().cpu() for t in (*values, x.grad, *gathered)]


def check(make, x: Tensor, dtype: torch.dtype, autocast: torch.dtype | None = None) -> set[str]:
    """Compare with float64: errors are at most thrice those of stock operators. Return what was called."""
    modules = [make().to(DEVICE) for _ in range(3)]
    truth, stock = (ReferenceBranched(copy.deepcopy(modules)).to(d) for d in (torch.float64, dtype))
    weights = torch.randn(truth.eval()(x.double()).shape, dtype=torch.float64, device=DEVICE)
    net, expected = bsfast.fuse(modules).to(dtype), steps(truth, x.double(), weights)
    with Calls() as calls:
        actual = steps(net, x.to(dtype), weights, autocast)
    plain = steps(stock, x.to(dtype), weights, autocast)
    names = ("trained", "evaluated", "without gradients", "input gradient", "running statistics", "gradients")
    # Triton's interpreter cuts bfloat16 off, which moves means by less than half a rounding.
    least = torch.finfo(autocast or dtype).eps / 4
    for name, *values, true in zip(names, actual, plain, expected, strict=True):
        error, stock_error = ((t - true).norm() / true.norm() for t in values)
        assert error <= 3 * stock_error + least, f"{name}: {error:.2e}, stock {stock_error:.2e}"
    return calls.seen


KINDS = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "float16 by autocast": (torch.float32, torch.float16),
    "bfloat16 by autocast": (torch.float32, torch.bfloat16),
}


# 64 samples fit the matrix units.
@pytest.mark.parametrize(("kind", "samples"), zip(KINDS, (17, 64, 5, 5, 64), strict=True))
def test_residual_networks_run_on_own_kernels(kind, samples):
    x = torch.randn(samples, 3, 6, 5, device=DEVICE)
    seen = check(Residual, x, *KINDS[kind])
    # In training, then in evaluation.
    assert seen >= {"conv2d_out mean", "conv2d_out scale", "batch_norm_out "}
    assert seen >= {"conv2d_out out_scale", "conv2d_out bias", "conv2d_out residual"}


CHAINS = [*((name, "float32") for name in ENDS), ("two in a row", "bfloat16 by autocast"), ("sum", "float16")]


@pytest.mark.parametrize(("name", "kind"), CHAINS)
def test_chains_run_on_own_kernels(name, kind):
    seen = check(lambda: Block(ENDS[name][0]), torch.randn(17, 3, 6, 5, device=DEVICE), *KINDS[kind])
    assert "conv2d_out " in seen or name == "no normalisation"  # whose sum is with an input that branches share


def test_plans_by_dtype():
    x = in_order(torch.randn(2, 8, 3, 4, 4, device=DEVICE), "batch_last")
    weight, scale = torch.randn(2, 5, 3, 3, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    geometry, norm = ((1, 1), (1, 1), (1, 1), 1), ops.Norm(scale, None, 1e-5, relu=True, moments=None)
    different = "operands of different dtypes or devices"
    assert ops.plan_norm_conv2d(x, weight, None, geometry, norm).algorithm == "native"
    assert ops.plan_norm_conv2d(x.half(), weight, None, geometry, norm).reason == different
    assert ops.plan_norm_conv2d(x.half(), weight.half(), None, geometry, norm).algorithm == "native"
    halves = norm._replace(weight=scale.half())
    assert ops.plan_norm_conv2d(x, weight, None, geometry, halves).reason == different
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (
            ops.plan_norm_conv2d(x.bfloat16(), weight, scale[:, :1].expand(2, 5), geometry, norm).algorithm == "native"
        )
        assert ops.plan_norm_conv2d(x, weight, None, geometry, None).algorithm == "native"
        reason = "autocast normalises torch.float32 and convolves torch.bfloat16"
        assert ops.plan_norm_conv2d(x, weight, None, geometry, norm).reason == reason


def test_a_cast_input_stays_what_others_take():
    x = in_order(torch.randn(2, 8, 3, 4, 4, device=DEVICE), "batch_last").requires_grad_()
    weight = torch.randn(2, 5, 3, 3, 3, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        result = ops.norm_conv2d(x, weight, None, ((1, 1), (1, 1), (1, 1), 1))
    assert result.x is x
    assert result.y.dtype == torch.bfloat16
    assert result.moments[0].dtype == torch.float32
    (result.y.float().sum() + result.x.sum()).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
