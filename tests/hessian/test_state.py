"""What calls leave behind (nothing), what they refuse, and how much memory they take."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import bsfast
from bsfast import hessian
from bsfast.hessian import HessianOperator
from bsfast.reference import ReferenceBranched
from tests.hessian import truth

CALLS = {
    "matmul": lambda H, data: H @ torch.ones(H.shape[0]).double(),
    "blocks": lambda H, data: hessian.blocks(H.net, F.cross_entropy, data, params="0.bias", which="all"),
    "autograd": lambda H, data: hessian.blocks(H.net, F.cross_entropy, data, params="0.bias", method="autograd"),
    "eigsh": lambda H, data: hessian.eigsh(H.variant(coupling="block_diag"), 1, max_iter=3),
    "trace": lambda H, data: hessian.trace(H.variant(coupling="block_diag")),
    "hutchinson": lambda H, data: hessian.trace(H.variant(coupling="block_diag"), method="hutchinson", num_matvecs=4),
    "density": lambda H, data: hessian.spectral_density(H.variant(coupling="block_diag"), lanczos_steps=2),
    "interaction": lambda H, data: hessian.block_interaction(H),
    "factors": lambda H, data: hessian.gradient_factors(H.net, F.cross_entropy, data).grad(1),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left_behind(name, training):
    branches = [truth.relu_net().double().train(training) for _ in range(2)]
    for net in (bsfast.fuse(branches), ReferenceBranched(branches)):
        data = truth.batch()
        parameters = dict(net.named_parameters())
        for own in parameters.values():
            own.grad = torch.ones_like(own)
        state = {n: own.clone() for n, own in net.state_dict().items()}
        modes = [module.training for module in net.modules()]
        hooks = [len(module._forward_hooks) for module in net.modules()]
        random = torch.get_rng_state()
        CALLS[name](HessianOperator(net, F.cross_entropy, data, params="1"), data)
        assert torch.equal(torch.get_rng_state(), random)
        now = net.state_dict()
        assert state.keys() == now.keys()
        assert all(torch.equal(now[n], own) for n, own in state.items())
        assert all(net.get_parameter(n) is own and own.requires_grad for n, own in parameters.items())
        assert all(torch.equal(own.grad, torch.ones_like(own)) for own in parameters.values())
        assert [module.training for module in net.modules()] == modes
        assert [len(module._forward_hooks) for module in net.modules()] == hooks


def test_an_exception_leaves_nothing_behind():
    def loss(f, y):
        if f.requires_grad:
            raise ValueError("stop")
        return f.sum()

    net, _ = truth.make(truth.relu_net, 2)
    before = dict(net.named_parameters())
    H = HessianOperator(net, loss, truth.batch(), check_deterministic=False)
    with pytest.raises(ValueError, match="stop"):
        H @ torch.ones(H.shape[0]).double()
    assert all(net.get_parameter(n) is own for n, own in before.items())


def test_results_do_not_depend_on_grad_mode_or_requires_grad():
    net, _ = truth.make(truth.relu_net, 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data, params="0")
    expected = H @ torch.ones(H.shape[0]).double()
    with torch.no_grad():
        assert torch.equal(HessianOperator(net, F.cross_entropy, data, params="0") @ torch.ones(76).double(), expected)
    net.requires_grad_(False)
    assert torch.equal(HessianOperator(net, F.cross_entropy, data, params="0") @ torch.ones(76).double(), expected)
    assert not any(own.requires_grad for own in net.parameters())
    with pytest.raises(ValueError, match="parameters that require gradients, got none"):
        HessianOperator(net, F.cross_entropy, data)


def test_what_is_not_deterministic_is_refused():
    x, y = truth.batch(10)
    dropout, _ = truth.make(lambda: truth.between(nn.Dropout(0.5)), 2)
    HessianOperator(dropout, F.cross_entropy, (x, y))
    with pytest.raises(RuntimeError, match=r"two passes over the data must agree.*dropout"):
        HessianOperator(dropout.train(), F.cross_entropy, (x, y))
    shuffled = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    dropped = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, drop_last=True)
    plain, _ = truth.make(truth.relu_net, 2)
    random = torch.get_rng_state()
    HessianOperator(plain, F.cross_entropy, shuffled) @ torch.ones(254).double()
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(RuntimeError, match="two passes"):
        HessianOperator(plain, F.cross_entropy, dropped)
    with pytest.raises(RuntimeError, match="two passes"):
        HessianOperator(plain.train(), F.cross_entropy, shuffled)
    HessianOperator(plain, F.cross_entropy, shuffled, check_deterministic=False)


def test_samples_that_depend_on_each_other_are_not_cut_apart():
    x, y = truth.batch(6)
    net, _ = truth.make(truth.tanh_net, 2)
    with pytest.raises(ValueError, match="chunk_size must be None where batch normalisation uses the statistics"):
        HessianOperator(net, F.cross_entropy, (x, y), chunk_size=2)
    mixing, _ = truth.make(lambda: truth.between(truth.Apply(lambda v: v + 0.1 * v.mean(0, keepdim=True))), 2)
    with pytest.raises(ValueError, match="chunk_size must be None where the net mixes the samples"):
        HessianOperator(mixing, F.cross_entropy, (x, y), chunk_size=2)
    HessianOperator(mixing, F.cross_entropy, (x, y))
    HessianOperator(net, F.cross_entropy, (x, y), chunk_size=6)


def test_data_errors():
    net, _ = truth.make(truth.relu_net, 2)
    x, y = truth.batch()
    for data, kind, message in [
        (iter([(x, y)]), TypeError, "can be iterated over again, got list_iterator"),
        ([], ValueError, "at least one batch, got none"),
        ([x], TypeError, r"must give batches \(x, y\), got Tensor"),
        ((x[:0], y[:0]), ValueError, "one N of at least 1"),
        (5, TypeError, "got int"),
    ]:
        with pytest.raises(kind, match=message):
            HessianOperator(net, F.cross_entropy, data)
    with pytest.raises(ValueError, match="num_data must be a positive int or None, got 0"):
        HessianOperator(net, F.cross_entropy, (x, y), num_data=0)
    with pytest.raises(ValueError, match="params must name a parameter or module, or be None for all, got no names"):
        HessianOperator(net, F.cross_entropy, (x, y), params=[])
    with pytest.raises(ValueError, match="net and data must give a finite loss, got the loss of nan"):
        HessianOperator(net, F.cross_entropy, (x * torch.nan, y), chunk_size=None)
    with pytest.raises(ValueError, match="chunk_size must be a positive int, 'auto' or None, got 0"):
        HessianOperator(net, F.cross_entropy, (x, y), chunk_size=0)


def test_operator_errors():
    net, branches = truth.make(truth.relu_net, 2)
    data = truth.batch()
    H = HessianOperator(net, F.cross_entropy, data, params="1")
    with pytest.raises(
        ValueError, match=r"shape \(D,\) or \(D, K\), \(M, P\)=\(2, 4\) or \(M, P, K\) with D=8, got \(5,\)"
    ):
        H @ torch.ones(5).double()
    with pytest.raises(TypeError, match=r"dtype and device \(torch\.float64, cpu\), got \(torch\.float32, cpu\)"):
        H @ torch.ones(8)
    with pytest.raises(TypeError, match=r"hessian: 1.weight must have the parameters' dtype and .*, got .*, meta\)"):
        H @ {"1.weight": torch.ones(2, 2, device="meta").double(), "1.bias": torch.ones(2, 2).double()}
    with pytest.raises(ValueError, match=r"must have the keys \['1.weight', '1.bias'\], got \['1.weight'\]"):
        H @ {"1.weight": torch.ones(2, 2).double()}
    with pytest.raises(ValueError, match=r"1.bias must have shape \(2, 2\) or \(2, 2\) and K, got \(2,\)"):
        H @ {"1.weight": torch.ones(2, 2).double(), "1.bias": torch.ones(2).double()}
    with pytest.raises(IndexError, match=r"branches must be below M=2, got \[0, 2\]"):
        H[0, 2]
    with pytest.raises(ValueError, match=r"at most max_bytes=9.31e-08 GiB, got 4.77e-07 GiB for 8 x 8; choose fewer"):
        H.to_dense(max_bytes=100)
    with pytest.raises(ValueError, match="coupling must be one of"):
        HessianOperator(net, F.cross_entropy, data, coupling="none")
    with pytest.raises(TypeError, match="net must have branch_outputs and stacked parameters or a ModuleList"):
        HessianOperator(branches[0], F.cross_entropy, data)
    tied = [nn.Linear(2, 2), nn.Linear(2, 2)]
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="branches must not share parameters"):
        HessianOperator(ReferenceBranched(tied), F.cross_entropy, (torch.ones(1, 2), torch.zeros(1).long()))


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operator returned, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [own.nbytes for own in tree_leaves(result) if isinstance(own, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


@pytest.mark.parametrize("method", ["ggn", "hvp"])
def test_chunks_bound_the_memory(method):
    net, _ = truth.make(lambda: truth.between(nn.ReLU()), 2)
    x, y = truth.batch(256)
    largest = {}
    for size in (None, 16):
        with LargestTensor() as seen:
            hessian.blocks(net, F.cross_entropy, (x, y), params="0.bias", method=method, chunk_size=size)
        largest[size] = seen.bytes
    activations = 2 * 2 * truth.SIZE**2 * 8  # bytes a sample
    assert largest[None] >= 256 * activations
    assert largest[16] < 256 * activations / 4
