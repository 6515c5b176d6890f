"""Branched networks f(x) = v_1(x) + ... + v_M(x): fused, differentiated and measured.

Names load on first use, so that ``bsfast.toy`` and ``bsfast.plotting`` work without importing torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("bsfast")

_HOME = {
    "fuse": "bsfast.fuse",
    "unfuse": "bsfast.fuse",
    "register_rule": "bsfast.fuse",
    "Branched": "bsfast.fuse",
}
_MODULES = ("analysis", "layout", "nn", "ops", "plotting", "reference", "toy")

__all__ = ["Branched", "__version__", "fuse", "register_rule", "unfuse", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(f"bsfast.{name}")
    else:
        raise AttributeError(f"module 'bsfast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
