"""What stands for a tensor or a size while forward code is traced: it records or refuses, it does not answer."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from torch import fx

from bsfast.fuse.inplace import AUGMENTED, Untraceable
from bsfast.fuse.questions import formats_text, reads_attribute

_OF_SHAPE = {"size", "dim", "ndimension", "numel", "is_floating_point", "is_complex", "element_size", "get_device"}
_OF_SHAPE |= {"shape", "ndim", "dtype", "device", "is_cuda", "itemsize"}
_OF_AUTOGRAD = {"requires_grad", "is_leaf", "grad", "grad_fn", "retains_grad", "_version", "_base"}


def from_shape(node: fx.Node) -> bool:
    """Say whether a value depends on tensors only through their shapes, dtypes and devices."""
    target: Any = node.target
    name = node.args[1] if target is getattr else getattr(target, "__name__", target)
    if node.op in {"call_method", "call_function"} and name in _OF_SHAPE:
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(from_shape, node.all_input_nodes))


class _Honest:
    """What Python asks of a value without recording it: the module runs by vmap, where values answer themselves."""

    tracer: Any

    def _refuse(self, reason: str) -> NoReturn:
        raise self.tracer.fail(Untraceable(self.tracer.path, reason))

    def __getattr__(self, name: str) -> Any:
        frame = sys._getframe(1)
        if not _is_torch(frame):
            if not reads_attribute(frame):
                self._refuse("it asks which attributes a value has")
            if name in _OF_AUTOGRAD:
                self._refuse(f"it asks for {name} of a value")
        if name == "data":
            return self.detach()  # the same, but for writes into it, and vmap allows it
        return Attribute(self, name)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_torch(sys._getframe(1)):
            self._refuse(f"it sets {name} of a value")
        super().__setattr__(name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asker = sys._getframe(1).f_code  # torch asks too, in Python and, from any frame, in C++
        if asker.co_name == "is_tensor" or ("isinstance" in asker.co_names and not _is_torch(sys._getframe(1))):
            self._refuse("it asks for the type of a value")
        return type(self)

    def __hash__(self) -> int:
        if not _is_torch(sys._getframe(1)):
            self._refuse("it uses a value as a dictionary key")
        return id(self)

    def __repr__(self) -> str:
        frame = sys._getframe(1)
        if not _is_torch(frame) and not formats_text(frame):  # f-strings are messages
            self._refuse("it prints a value")
        return super().__repr__()


def _refusing(reason: str) -> Callable[..., NoReturn]:
    def refuse(self: _Honest, *_: Any) -> NoReturn:
        self._refuse(reason)

    return refuse


for _names, _reason in {
    "int float complex index array len contains": "it asks for the value of a tensor or a size",
    "setitem delitem": "it writes into a part of a tensor",
    "copy deepcopy": "it copies a value",
}.items():
    for _name in _names.split():
        setattr(_Honest, f"__{_name}__", _refusing(_reason))


def _augmented(write: Callable[..., Any], new: Callable[..., Any]) -> Callable[..., fx.Proxy]:
    """``x += y`` as an in-place operation: torch.fx would record ``x = x + y``, which other names of x do not see."""

    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        target = new if from_shape(self.node) else write  # sizes are immutable
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _write, _new in AUGMENTED.items():
    setattr(_Honest, f"__{_write.__name__}__", _augmented(_write, _new))


class Proxy(_Honest, fx.Proxy):
    """A value."""


class Attribute(_Honest, fx.proxy.Attribute):
    """An attribute of a value, or a method about to be called."""


def _is_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).split(".")[0] in {"torch", "bsfast"}
