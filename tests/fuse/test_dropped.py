"""What a fused network could not keep is refused by name: hooks, shared memory, later parametrizations."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bsfast
from tests.fuse.forward_code import Forward, fuse_code
from tests.fuse.same import assert_same

HOOKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tensor": (lambda m: m.weight.register_hook(lambda g: g * 0), "a gradient hook on '0.weight' of branch 1"),
    "accumulate": (
        lambda m: m.bias.register_post_accumulate_grad_hook(lambda p: None),
        "a hook after gradient accumulation on '0.bias' of branch 1",
    ),
    "state": (
        lambda m: m.register_state_dict_post_hook(lambda *_: None),
        "a state-dict hook on Linear '0' of branch 1",
    ),
    "state-pre": (lambda m: m.register_state_dict_pre_hook(lambda *_: None), "a state-dict pre-hook on Linear '0'"),
    "load": (
        lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
        "a load-state-dict hook on Linear '0' of branch 1",
    ),
    "load-pre": (
        lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
        "a load-state-dict pre-hook on Linear '0' of branch 1",
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_fuse_refuses_hooks_of_tensors_and_state_dicts(name: str) -> None:
    register, message = HOOKS[name]
    branches = [nn.Sequential(nn.Linear(3, 3)) for _ in range(2)]
    handle = register(branches[1][0])
    with pytest.raises(ValueError, match=f"must have no hooks, got {message}"):
        bsfast.fuse(branches)
    handle.remove()
    assert bsfast.fuse(branches)


class Views(nn.Module):
    """A plain tensor or a parameter that views another."""

    def __init__(self, view: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))
        self.v = view(self.w)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.mT + self.v.sum()


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.detach(),
        lambda w: w.data[1:, 1],
        lambda w: nn.Parameter(w.detach()[2]),
        lambda w: nn.Buffer(w.detach().mT),
    ],
)
def test_fuse_refuses_tensors_that_share_memory(view: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        ValueError, match=r"must not share memory, got '[vw]' of branch \d and '[vw]' of branch \d; clone"
    ):
        bsfast.fuse([Views(view) for _ in range(2)])


def test_fuse_refuses_branches_that_share_memory() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    branches = [nn.Sequential(nn.Linear(3, 3)) for _ in range(3)]
    branches[0][0].weight = weight
    branches[2][0].weight = nn.Parameter(weight.data)
    with pytest.raises(ValueError, match=r"must not share memory, got '0.weight' of branch 0 and '0.weight' of branch"):
        bsfast.fuse(branches)


def test_tied_and_neighbouring_tensors_are_no_shared_memory() -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(9)  # as cuDNN keeps the weights of an LSTM
            self.w, self.b = nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(flat[6:])
            self.tied = self.w
            self.empty, self.also = nn.Buffer(torch.zeros(0)), nn.Buffer(torch.zeros(0))
            self.table = table

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.b) @ self.tied.mT + self.table

    table = torch.randn(2)  # plain and shared by all branches
    assert_same([Slices() for _ in range(2)], torch.randn(5, 3))


NODE_HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
]


@pytest.mark.parametrize("register", NODE_HOOKS)
@pytest.mark.parametrize(("path", "name"), [("0", "Sequential"), ("0.1", "ReLU")])
def test_hooks_on_nodes_that_never_run_are_refused(register: str, path: str, name: str) -> None:
    net = bsfast.fuse([nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU())) for _ in range(2)])
    for node in (net, copy.deepcopy(net)):
        with pytest.raises(ValueError, match=f"{register}: hooks must be on the network or a fused layer, got {name}"):
            getattr(node.get_submodule(path), register)(lambda *_: None)
    hits = []
    net.get_submodule("0.0").register_forward_hook(lambda *_: hits.append(1))
    net(torch.randn(2, 3))
    assert hits == [1]


def test_hooks_inside_a_module_run_by_vmap_are_refused() -> None:
    with pytest.warns(UserWarning, match="cannot be traced"):
        net = bsfast.fuse([nn.Sequential(Forward(lambda m, x: m.linear(x) if x.shape[0] else x)) for _ in range(2)])
    handle = net.get_submodule("0.linear").register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks must not be inside what runs by vmap, got one on 'linear' of Forward"):
        net(torch.randn(2, 3))
    handle.remove()
    assert net(torch.randn(2, 3)).shape == (2, 3)


def test_unfuse_refuses_parametrized_layers() -> None:
    net = bsfast.fuse([nn.Sequential(nn.Linear(3, 3)) for _ in range(2)])
    parametrize.register_parametrization(net.get_submodule("0"), "weight", nn.Tanh())
    assert net(torch.randn(2, 3)).shape == (2, 3)
    with pytest.raises(
        ValueError, match=r"unfuse: net must have the tensors it was made with, got no '0.weight'.*remove_parametriz"
    ):
        bsfast.unfuse(net)


def test_constants_must_agree_in_shape_and_dtype() -> None:
    for other, message in (
        (torch.ones(3), r"'table' must have one shape, got \(1,\) in branch 0 and \(3,\) in branch 2"),
        (torch.ones(1, dtype=torch.float64), "'table' must have one dtype, got torch.float32 in branch 0"),
    ):
        branches = [Forward(lambda m, x: m.linear(x) * m.table, table=torch.ones(1)) for _ in range(3)]
        branches[2].table = other
        with pytest.raises(ValueError, match=f"fuse: the tensor {message}"):
            bsfast.fuse(branches)


def test_constants_that_forward_makes_are_told_by_their_node() -> None:
    branches = [Forward(lambda m, x: m.linear(x) * torch.ones(m.size), size=size) for size in (1, 3)]
    with pytest.raises(ValueError, match=r"a tensor that forward makes must have one shape, got \(1,\) .* and \(3,\)"):
        bsfast.fuse(branches)
    assert fuse_code(lambda m, x: m.linear(x) * torch.ones(3))(torch.ones(2, 3)).shape == (2, 3)
