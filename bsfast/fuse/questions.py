"""Questions of forward code that a proxy cannot hear, found in bytecode: ``type(x)``, ``is``, gradient mode."""

import dis
import functools
from collections.abc import Iterator
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import nn

_OF_CONTEXT = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"}
_OF_CONTEXT |= {"get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype"}
_UNIQUE = {"dtype", "layout"}  # properties of tensors that are often compared by identity


def question_in(module: nn.Module) -> str:
    """Look for such questions in a module's forward, and in methods and functions of its package that it names.

    Args:
        module: Module about to be traced.

    Returns:
        What it asks; empty if nothing was found.
    """
    return next(filter(None, map(_question, _codes_of(module))), "")


def reads_attribute(frame: FrameType) -> bool:
    """Say whether a frame is at ``x.name``, rather than in ``hasattr(x, name)`` or ``getattr(x, name)``."""
    return _instruction(frame).startswith("LOAD_")


def formats_text(frame: FrameType) -> bool:
    """Say whether a frame is in an f-string."""
    return _instruction(frame).startswith(("FORMAT_", "CONVERT_"))


def _instruction(frame: FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _codes_of(module: nn.Module) -> Iterator[CodeType]:
    package = type(module).__module__.partition(".")[0]
    queue: list[Any] = [type(module).forward]
    seen: set[FunctionType] = set()
    while queue:
        function = queue.pop()
        if not isinstance(function, FunctionType) or function in seen or not _is_of(function, package):
            continue
        seen.add(function)
        queue += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        for code in _nested(function.__code__):
            yield code
            known = [function.__globals__.get(name) for name in code.co_names]
            homes = [function.__globals__, *(vars(value) for value in known if isinstance(value, ModuleType))]
            queue += [home.get(name) for name in code.co_names for home in (*homes, vars(module))]
            queue += [getattr(type(module), name, None) for name in code.co_names]


def _is_of(function: FunctionType, package: str) -> bool:
    return function.__module__ is not None and function.__module__.partition(".")[0] == package != "torch"


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


@functools.lru_cache(maxsize=1024)
def _question(code: CodeType) -> str:
    context = _OF_CONTEXT.intersection(code.co_names)
    if context:
        return f"it asks {min(context)}()"
    instructions = [i for i in dis.get_instructions(code) if i.opname not in {"PUSH_NULL", "EXTENDED_ARG"}]
    for before, now, after in zip(instructions, instructions[1:], instructions[2:], strict=False):
        asks = before.opname in {"LOAD_GLOBAL", "LOAD_NAME"} and before.argval in {"type", "id"}
        of_local = now.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and now.argval not in {"self", "cls"}
        if asks and of_local and after.opname not in {"LOAD_ATTR", "LOAD_METHOD"}:
            return f"it asks for the {before.argval} of {now.argval!r}"
        is_none = before.opname.startswith("LOAD_") and before.argval is None
        if now.opname == "IS_OP" and not is_none and _UNIQUE.intersection(code.co_names):
            return "it compares by identity"
    return ""
