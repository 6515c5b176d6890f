"""torch.compile, torch.func and float32 on whole fused networks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsfast
from bsfast.reference import ReferenceBranched
from tests.networks import NETWORKS, Residual

COMPILED = ["residual-block", "adain", "mlp", "norm-instancenorm-affine-stats", "code-inplace-chain", "text"]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_full_graph(name: str, dynamic: bool) -> None:
    assert_compiles(name, "aot_eager", dynamic)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_inductor(dynamic: bool) -> None:
    assert_compiles("residual-block", "inductor", dynamic)


def assert_compiles(name: str, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    network = NETWORKS[name]
    net = bsfast.fuse(network.make, num_branches=3).double()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for samples in (17, 19) if dynamic else (17,):
        inputs = network.draw(samples)
        for x in inputs if dynamic else ():
            torch._dynamo.mark_dynamic(x, 0)
        got, want = compiled(*inputs), twin(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        net.zero_grad()
        twin.zero_grad()
        got.sin().sum().backward()
        want.sin().sum().backward()
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 2, bias=False))


@pytest.mark.parametrize("samples", [3, 17])
def test_torch_func_derivatives(samples: int) -> None:
    branches = [small().double() for _ in range(2)]
    net, reference = bsfast.fuse(branches), ReferenceBranched(branches)
    x = torch.randn(samples, 1, 4, 4, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().mean()

    def reference_loss(parameters: dict[str, Tensor]) -> Tensor:
        own = {f"branches.{k}.{name}": t[k] for name, t in parameters.items() for k in range(2)}
        return torch.func.functional_call(reference, own, (x,)).square().mean()

    for transform in (torch.func.grad, lambda f: torch.func.hessian(lambda w: f({**parameters, "0.weight": w}))):
        argument: Any = parameters if transform is torch.func.grad else parameters["0.weight"]
        torch.testing.assert_close(transform(loss)(argument), transform(reference_loss)(argument))
    several = {name: torch.stack([t, 2 * t]) for name, t in parameters.items()}
    got = torch.func.vmap(loss)(several)
    torch.testing.assert_close(got, torch.stack([loss({n: t[i] for n, t in several.items()}) for i in range(2)]))


@pytest.mark.parametrize("samples", [5, 33])
def test_float32_gradients_are_as_good_as_stock(samples: int) -> None:
    branches = [nn.Sequential(Residual(1), nn.Linear(5, 3)) for _ in range(4)]
    net = bsfast.fuse(branches)
    exact = ReferenceBranched([branch.double() for branch in bsfast.unfuse(net)])
    stock = ReferenceBranched(branches)
    x = torch.randn(samples, 3, 9, 7)
    for module, data in ((net, x), (stock, x), (exact, x.double())):
        module(data).sin().sum().backward()
    for name, parameter in net.named_parameters():
        single, double = (
            torch.stack([branch.get_parameter(name).grad for branch in module.branches]) for module in (stock, exact)
        )
        ours, theirs = (parameter.grad - double).norm(), (single - double).norm()
        # Gradients in front of a BatchNorm may vanish: then the roundoff of what was summed counts.
        assert ours <= 3 * theirs + 1e-6 * double.norm() + 1e-6
