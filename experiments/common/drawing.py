"""Figures as data: what a drawing function was called with, in JSON, so that it can be called again without PyTorch."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_DPI = 130
_PACKAGES = ("bsfast.plotting", "experiments")
_DIGITS = 6
_ARRAY = {"dtype", "shape", "values"}


def encode(value: Any) -> Any:
    """Turn arguments of a drawing function into JSON types; an array becomes its dtype, shape and values.

    Args:
        value: Numbers, text, None, arrays, tensors, and lists, tuples and dicts of these.

    Returns:
        The same in JSON types; what is not finite in an array becomes its name.

    Raises:
        TypeError: If there is anything else in it.
    """
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        values = array.ravel().tolist()
        if array.dtype.kind == "f":
            values = [float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else str(number) for number in values]
        return {"dtype": array.dtype.name, "shape": list(array.shape), "values": values}
    raise TypeError(f"encode: value must be JSON-like, an array or a tensor, got {type(value).__name__}")


def decode(value: Any) -> Any:
    """Undo :func:`encode`; tensors come back as arrays and tuples as lists."""
    if isinstance(value, dict):
        if value.keys() == _ARRAY:
            return np.array(value["values"], dtype=value["dtype"]).reshape(value["shape"])
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def name_of(draw: Callable[..., Figure]) -> str:
    """Name a drawing function as ``module:function``.

    Args:
        draw: A public function of ``bsfast.plotting`` or ``experiments``.

    Returns:
        The name.

    Raises:
        ValueError: If it is another function.
    """
    module, function = draw.__module__, draw.__qualname__
    allowed = any(module == package or module.startswith(f"{package}.") for package in _PACKAGES)
    if not allowed or not function.isidentifier() or function.startswith("_"):
        raise ValueError(
            f"name_of: draw must be a public function of {' or '.join(_PACKAGES)}, got {module}.{function}"
        )
    return f"{module}:{function}"


def draw_png(draw: Callable[..., Figure], data: dict[str, Any]) -> bytes:
    """Draw a figure and return it as PNG.

    Args:
        draw: Makes the figure.
        data: Its arguments.

    Returns:
        Content of a PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(**data)
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, dpi=FIGURE_DPI, format="png", bbox_inches="tight", facecolor="white")
    return content.getvalue()
