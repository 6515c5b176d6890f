"""Reductions over an int, a tuple, a list or no axes at all are those of every branch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.fuse.forward_code import Forward
from tests.fuse.same import assert_same

AXES: dict[str, Any] = {
    "int": 1,
    "negative": -1,
    "tuple": (0, 2),
    "list": [0, -1],
    "one-list": [1],
    "no-tuple": (),
    "no-list": [],
    "none": None,
}
FUNCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "softmax", "log_softmax")


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_reductions_take_axes_in_every_form(name: str, axes: str) -> None:
    dim: Any = AXES[axes]
    one_axis = isinstance(dim, int)
    if name.endswith("softmax") and not one_axis:
        pytest.skip("takes one axis")
    if name in {"logsumexp", "amax", "amin"} and dim is None:
        pytest.skip("takes no None")
    flat = name == "logsumexp" and not dim and not one_axis  # torch itself fails without keepdim
    keepdims = [True] if flat else [False, True]
    homes = [
        getattr(torch, name),
        getattr(torch.Tensor, name),
        *([getattr(F, name)] if one_axis and "soft" in name else []),
    ]

    def code(m: Any, x: torch.Tensor) -> list[torch.Tensor]:
        y = m.linear(x)
        y = y.detach() if name in {"var", "std"} and dim in ((), []) else y  # torch's own gradient is infinite
        method = getattr(y, name)
        if name.endswith("softmax"):
            return [method(dim), method(dim=dim), *(home(y, dim) for home in homes[::2]), homes[0](y, dim=dim)]
        results = [torch_function(y, dim=dim, keepdim=keepdim) for keepdim in keepdims]
        results += [method(dim=dim, keepdim=keepdim) for keepdim in keepdims]
        return results if flat or dim is None else [*results, method(dim), torch_function(y, dim)]

    torch_function = homes[0]
    assert_same([Forward(code).double() for _ in range(2)], torch.randn(4, 5, 3, dtype=torch.float64))
