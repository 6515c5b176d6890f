"""Forward code that asks what a tracer cannot answer runs by vmap, also where it catches the refusal."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bsfast
from bsfast.reference import ReferenceBranched
from tests.fuse.forward_code import Forward


def _doubles_if(answer: Callable[[Any, Tensor], bool]) -> Callable[[Any, Tensor], Tensor]:
    def code(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        return y * 2 if answer(m, y) else y

    return code


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor


def _catches(ask: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def code(m: Any, x: Tensor) -> Tensor:
        try:
            return m.linear(x) * ask(x)
        except Exception:
            return m.linear(x)

    return code


def _catches_in_submodule(m: Any, x: Tensor) -> Tensor:
    try:
        return m.inner(x)
    except Exception:
        return m.linear(x)


def _sets_part(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    y[:, 0] = 0
    return y


QUESTIONS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "type": (_doubles_if(lambda m, y: type(y) is Tensor), "it asks for the type of 'y'"),
    "type-in-function": (_doubles_if(lambda m, y: _is_plain(y)), "it asks for the type of 'value'"),
    "id": (_doubles_if(lambda m, y: id(y) in m.known), "it asks for the id of 'y'"),
    "dtype-is": (_doubles_if(lambda m, y: y.dtype is torch.float32), "it compares by identity"),
    "requires-grad": (_doubles_if(lambda m, y: y.requires_grad is True), "it asks for requires_grad"),
    "hasattr": (_doubles_if(lambda m, y: not hasattr(y, "materialize")), "it asks which attributes a value has"),
    "getattr": (_doubles_if(lambda m, y: getattr(y, "gone", None) is None), "it asks which attributes a value has"),
    "device-type": (_doubles_if(lambda m, y: hasattr(y.device, "index")), "it asks which attributes a value has"),
    "grad-mode": (_doubles_if(lambda m, y: torch.is_grad_enabled()), r"it asks is_grad_enabled\(\)"),
    "autocast": (_doubles_if(lambda m, y: not torch.is_autocast_enabled("cpu")), r"it asks is_autocast_enabled\(\)"),
    "print": (_doubles_if(lambda m, y: str(y.shape) == "torch.Size([5, 3])"), "it prints a value"),
    "part": (_sets_part, "it writes into a part"),
    "catch-shape": (_catches(lambda x: 2 if x.shape[0] > 4 else 3), "its control flow depends on shapes"),
    "catch-int": (_catches(lambda x: int(x.shape[0])), "it asks for the value"),
    "catch-len": (_catches(len), "it asks for the value"),
    "catch-iter": (_catches(lambda x: sum(row.sum() for row in x)), "it iterates over a value"),
    "catch-isinstance": (_catches(lambda x: 2 if isinstance(x, Tensor) else 3), "it asks for the type of a value"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_fuse_runs_questions_by_vmap(name: str) -> None:
    code, reason = QUESTIONS[name]
    branches = [Forward(code, known=()) for _ in range(2)]
    with pytest.warns(UserWarning, match=f"the whole branch.* cannot be traced \\({reason}"):
        net = bsfast.fuse(branches)
    for enabled in (True, False):
        x = torch.randn(5, 3)
        with torch.set_grad_enabled(enabled):
            got, want = net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x)
        torch.testing.assert_close(got, want)
        if enabled:
            got.sin().sum().backward()
            grads = [
                torch.autograd.grad(v.sin().sum(), b.linear.weight)[0] for b, v in zip(branches, want, strict=True)
            ]
            torch.testing.assert_close(net.linear.weight.grad, torch.stack(grads))


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy])
def test_fuse_traces_no_copies_of_values(copies: Callable[[Any], Any]) -> None:
    branches = [Forward(lambda m, x: copies(m.linear(x))) for _ in range(2)]
    with pytest.warns(UserWarning, match=r"cannot be traced \(it copies a value\)"):
        bsfast.fuse(branches)


def test_a_caught_refusal_stays_one() -> None:
    code = _catches(lambda x: 2 if x.sum() > 0 else 3)
    with pytest.raises(ValueError, match="control flow must not depend on data"):
        bsfast.fuse([Forward(code) for _ in range(2)])


def test_a_refusal_caught_outside_its_module_stays_one() -> None:
    branches = [Forward(_catches_in_submodule) for _ in range(2)]
    for branch in branches:
        branch.inner = Forward(QUESTIONS["catch-int"][0])
    with pytest.warns(UserWarning, match="Forward 'inner' cannot be traced"):
        net = bsfast.fuse(branches)
    x = torch.randn(5, 3)
    torch.testing.assert_close(net.branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))


def _asserts(m: Any, x: Tensor) -> Tensor:
    torch._assert(x.shape[1] == 3, f"expected 3 columns, got {x.shape[1]}")
    return m.linear(x)


ORDINARY: dict[str, Callable[[Any, Tensor], Any]] = {
    "is-none": lambda m, x: m.linear(x) if m.optional is None else x.to(x.dtype),
    "is-true": lambda m, x: m.linear(x) if m.flag is True else x,
    "assert": _asserts,
    "type-of-module": lambda m, x: m.linear(x) * len(type(m.linear).__name__),
    "getattr-of-module": lambda m, x: getattr(m, "linear")(x).view(x.shape[0], -1),  # noqa: B009
    "has-module": lambda m, x: m.linear(x).flatten(1) if hasattr(m, "linear") else x,
}


@pytest.mark.parametrize("name", ORDINARY)
def test_fuse_traces_ordinary_questions(name: str) -> None:
    branches = [Forward(ORDINARY[name], optional=None, flag=True) for _ in range(2)]
    x = torch.randn(5, 3)
    torch.testing.assert_close(bsfast.fuse(branches).branch_outputs(x), ReferenceBranched(branches).branch_outputs(x))


def test_data_of_a_parameter_is_its_detached_value() -> None:
    branches = [Forward(lambda m, x: x @ m.linear.weight.data.mT + m.linear.bias) for _ in range(2)]
    net, x = bsfast.fuse(branches), torch.randn(5, 3)
    want = ReferenceBranched(branches).branch_outputs(x)
    torch.testing.assert_close(net.branch_outputs(x), want)
    net(x).sin().sum().backward()
    want.sum(0).sin().sum().backward()
    assert net.linear.weight.grad is None
    torch.testing.assert_close(net.linear.bias.grad, torch.stack([b.linear.bias.grad for b in branches]))


def test_fuse_refuses_a_call_of_its_own() -> None:
    class Tripled(Forward):
        def __call__(self, x: Tensor) -> Any:
            return 3 * super().__call__(x)

    with pytest.raises(ValueError, match=r"must be called by torch.nn.Module.__call__, got Tripled.__call__"):
        bsfast.fuse([Tripled(lambda m, x: m.linear(x)) for _ in range(2)])
