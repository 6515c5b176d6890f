"""Branched networks f(x) = v_1(x) + ... + v_M(x): fused, differentiated and measured.

Names load on first use, so that ``bsfast.toy`` and ``bsfast.plotting`` work without importing torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsfast import analysis, hessian, layout, nn, ops, plotting, reference, toy
    from bsfast.fuse import Branched, fuse, register_rule, unfuse
    from bsfast.memory import keep_freed_memory

try:
    __version__ = version("bsfast")
except PackageNotFoundError:
    raise ImportError(
        "bsfast is not installed; in the folder of its source, run `pip install --no-build-isolation -e .`"
    ) from None

__all__ = [
    "Branched",
    "__version__",
    "analysis",
    "fuse",
    "hessian",
    "keep_freed_memory",
    "layout",
    "nn",
    "ops",
    "plotting",
    "reference",
    "register_rule",
    "toy",
    "unfuse",
]

_INSIDE = dict.fromkeys(("Branched", "fuse", "register_rule", "unfuse"), "fuse") | {"keep_freed_memory": "memory"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bsfast' has no attribute {name!r}")
    module = import_module(f"bsfast.{_INSIDE.get(name, name)}")
    value = getattr(module, name) if name in _INSIDE else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
