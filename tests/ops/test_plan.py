"""The choice of algorithm and the reasons it gives."""

import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bsfast.fuse.program import enter
from bsfast.ops import backend, conv2d, plan
from tests.cases import ConvCase

NATIVE = plan.Conv2d("cpu", torch.float32, True, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, False, (3, 8), (9, 9))
REASONS = [
    ({"dtype": torch.bfloat16}, "torch.bfloat16 has no own kernel"),
    ({"batch_last": False}, "the activations are not batch-last in memory"),
]
SETTINGS = [
    {"kernel_size": (1, 5)},
    {"stride": (2, 1)},
    {"padding": (0, 3)},
    {"dilation": (1, 2)},
    {"groups": 2},
    {"shared": True},
    {"kernel_size": (7, 2), "stride": (3, 2), "padding": (2, 9), "dilation": (2, 3), "groups": 4},
]
NEEDS_NATIVE = pytest.mark.skipif(backend.native_why_not("cpu") is not None, reason="no own CPU kernels here")


CHOICES = [plan.conv2d, plan.conv2d_input_grad, plan.conv2d_weight_grad]
STOCK = dict(zip(CHOICES, ["grouped", "grouped", "loop"], strict=True))  # of 64 samples


@NEEDS_NATIVE
@pytest.mark.parametrize("choose", CHOICES)
def test_plan_reasons(choose):
    for change in [{}, {"dtype": torch.float64}, *SETTINGS]:
        assert choose(NATIVE._replace(**change)) == plan.Plan("native", "batch-last: samples in the vector lanes")
    for change, reason in REASONS:
        assert choose(NATIVE._replace(**change)) == plan.Plan(STOCK[choose], reason)


@NEEDS_NATIVE
def test_plan_shared_input_with_groups():
    problem = NATIVE._replace(shared=True, groups=2)
    assert [choose(problem).algorithm for choose in CHOICES] == ["native", "grouped", "native"]
    reason = "groups inside a branch have no own kernel for the gradient of a shared input"
    assert plan.conv2d_input_grad(problem) == plan.Plan("grouped", reason)


WIDE = NATIVE._replace(channels=(32, 32), size=(8, 8), padding=(1, 1))
DIRECT = [
    {"dtype": torch.float64},
    {"stride": (2, 1)},
    {"dilation": (1, 2)},
    {"kernel_size": (3, 1)},
    {"padding": (3, 1)},
]


@NEEDS_NATIVE
@pytest.mark.parametrize("choose", CHOICES)
def test_plan_winograd(choose):
    how = "batch-last: samples in the vector lanes; Winograd by 2x2 outputs"
    assert choose(WIDE) == plan.Plan("native", how, tile=2)
    for change in DIRECT:
        assert choose(WIDE._replace(**change)).tile == 0, change
    assert choose(WIDE._replace(channels=(3, 3))).tile == 0  # transforms would take more than they save
    assert choose(WIDE._replace(size=(1, 1))).tile == 0  # most of a tile would lie outside


@NEEDS_NATIVE
def test_plan_patches():
    few = WIDE._replace(samples=1)
    how = "batch-last: column taps and channels in the vector lanes"
    assert plan.conv2d_weight_grad(few) == plan.Plan("native", how, patches=True)
    assert not plan.conv2d(few).patches
    for change in [{"dilation": (1, 2)}, {"samples": 128}, {"channels": (0, 8)}]:
        assert not plan.conv2d_weight_grad(few._replace(**change)).patches, change
    assert plan.conv2d_weight_grad(few._replace(dilation=(2, 1), dtype=torch.float64)).patches


@NEEDS_NATIVE
@pytest.mark.parametrize("choose", CHOICES)
def test_plan_set_winograd_tile(choose, winograd_tile):
    for tile in (4, 0, 2):
        winograd_tile(tile)
        assert choose(WIDE).tile == tile
    winograd_tile(4)
    assert choose(WIDE._replace(size=(2, 2))).tile != 4
    assert choose(WIDE._replace(samples=5)).tile == 0


def test_plan_set_winograd_tile_refuses(winograd_tile):
    for tile in (3, -2, True, "2"):
        with pytest.raises(ValueError, match=re.escape(f"tile must be 0, 2 or 4, got {tile!r}")):
            winograd_tile(tile)


@pytest.mark.parametrize(
    ("device", "reason"), [("mps", "no own kernels for device type 'mps'"), ("cuda", backend.native_why_not("cuda"))]
)
def test_plan_other_devices(device, reason):
    assert reason
    assert plan.conv2d(NATIVE._replace(device=device)) == plan.Plan("grouped", reason)
    assert plan.memory_order(device=device, dtype=torch.float32) == plan.Plan("contiguous", reason)


@NEEDS_NATIVE
def test_plan_memory_order():
    def order(dtype: torch.dtype) -> plan.Plan:
        return plan.memory_order(device="cpu", dtype=dtype)

    reason = "the own kernels are fastest with samples innermost, however few"
    assert order(torch.float32) == order(torch.float64) == plan.Plan("batch_last", reason)
    assert order(torch.float16) == plan.Plan("contiguous", "torch.float16 has no own kernel")


def test_plan_noting_ends_with_its_block():
    case = ConvCase(2, 1, 2, 2, (3, 3))
    with plan.noting() as outer:
        conv2d(case.x(), case.weight())
        with plan.noting() as inner:
            conv2d(case.x(), case.weight())
        conv2d(case.x(), case.weight())
    conv2d(case.x(), case.weight())
    assert (len(outer), len(inner)) == (2, 1)


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("case", "planned"),
    [
        (ConvCase(2, 1, 2, 2, (3, 3)), plan.Plan("native", "batch-last: columns and samples in the vector lanes")),
        (
            ConvCase(2, 3, 2, 2, (3, 3), order="batch_last"),
            plan.Plan("native", "batch-last: columns and samples in the vector lanes"),
        ),
        (ConvCase(2, 3, 2, 2, (3, 3)), plan.Plan("grouped", "the activations are not batch-last in memory")),
        (
            ConvCase(2, 1, 2, 2, (3, 3), order="strided"),
            plan.Plan("grouped", "the activations are not batch-last in memory"),
        ),
        (
            ConvCase(2, 0, 2, 2, (3, 3), order="batch_last"),
            plan.Plan("grouped", "the activations are not batch-last in memory"),
        ),
    ],
    ids=str,
)
def test_plan_of_few_samples(case, planned):
    with plan.noting() as notes:
        conv2d(case.x(), case.weight())
    assert notes == [planned]


SWITCHED_OFF = """
import torch
from bsfast.ops import backend, conv2d, plan
from tests.cases import NATIVE_CONV
with plan.noting() as notes:
    for case in NATIVE_CONV:
        x, weight = case.x(), case.weight()
        torch.testing.assert_close(conv2d(x, weight, **case.geometry), case.loop(x, weight))
print({*notes}, backend.backends()[0], plan.memory_order(device="cpu", dtype=torch.float32).algorithm)
"""


def test_plan_native_switched_off(monkeypatch):
    monkeypatch.setenv("BSFAST_NATIVE", "0")
    output = subprocess.run([sys.executable, "-c", SWITCHED_OFF], capture_output=True, text=True, check=True).stdout
    why_not = "switched off by BSFAST_NATIVE=0"
    expected = {plan.Plan("grouped", why_not)}
    assert output.strip() == f"{expected} {backend.Backend('native', 'cpu', why_not)} contiguous"


def test_memory_order_is_what_was_measured_faster(monkeypatch):
    monkeypatch.setitem(backend._why_not, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    own = plan.memory_order(device="cuda", dtype=torch.bfloat16)
    assert own.algorithm == "batch_last"
    monkeypatch.setattr(plan, "_STOCK_FASTER", {("sm_90", torch.bfloat16): 1.25, ("sm_70", torch.float32): 2.0})
    reason = "stock operators were measured 1.2 times faster on sm_90"
    assert plan.memory_order(device="cuda", dtype=torch.bfloat16) == plan.Plan("contiguous", reason)
    assert plan.memory_order(device="cuda", dtype=torch.float32) == own


def test_memory_order_is_that_of_the_dtype_of_autocast(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda" and bool(asked))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(
        plan, "memory_order", lambda **given: asked.append(given["dtype"]) or plan.Plan("contiguous", "")
    )
    with FakeTensorMode():
        for _ in range(2):
            enter(torch.empty(2, 3, 4, 4, device="cuda"))
    assert asked == [torch.float32, torch.bfloat16]
