"""Networks to capture as CUDA graphs, and what stands in for a graph without a GPU, with fixed memory as one has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from bsfast.fuse.cuda_graph import CudaGraph

ON_GPU = torch.empty(0).is_cuda


def replayed_without_a_gpu(function: Callable[..., Tensor], given: tuple[Tensor, ...], allow_unused_input: bool) -> Any:
    """Do as ``torch.cuda.make_graphed_callables``: warm-up, then fixed memory for inputs, results and gradients."""
    assert allow_unused_input
    assert not torch.is_autocast_enabled("cpu")
    assert not any(isinstance(tensor, nn.Parameter) for tensor in given)  # autograd would bind them to this stream
    leaves = [tensor for tensor in given if tensor.requires_grad]
    for _ in range(3):
        outputs = function(*given)
        if outputs.requires_grad:
            torch.autograd.grad(outputs, leaves, torch.empty_like(outputs), allow_unused=True)
    result = torch.empty_like(outputs, requires_grad=False)
    grads = [torch.empty_like(tensor, requires_grad=False) for tensor in given]
    recorded: list[Tensor] = []

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            for own, tensor in zip(given, tensors, strict=True):
                if own.data_ptr() != tensor.data_ptr():
                    own.copy_(tensor)
            unchecked = saved_tensors_hooks(lambda kept: kept, lambda kept: kept)  # a replay knows of no versions
            with torch.inference_mode(False), torch.enable_grad(), unchecked:
                recorded[:] = [function(*given)]
            return result.copy_(recorded[0].detach()).detach()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            with torch.enable_grad():
                found = iter(torch.autograd.grad(recorded[0], leaves, grad, allow_unused=True, retain_graph=True))
            values = [next(found) if tensor.requires_grad else None for tensor in given]
            return tuple(
                None if value is None else own.copy_(value).detach() for own, value in zip(grads, values, strict=True)
            )

    return Replay.apply


def capture_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CudaGraph]:
    """Return what captures a network; where there is no GPU, past the check that there is one."""
    if ON_GPU:
        return lambda net, *inputs, **settings: net.cuda_graph(*inputs, **settings)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", replayed_without_a_gpu)
    return lambda net, *inputs, per_branch=False: CudaGraph(net, inputs, per_branch)


def make_branch() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
