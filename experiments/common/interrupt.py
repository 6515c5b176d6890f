"""End long work at a moment of its own choice: Ctrl-C and SIGTERM become a question that the work asks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Work that ended early because it was asked to, with everything saved."""


@contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Within the block, the first Ctrl-C or SIGTERM only sets a flag; the second has its usual effect.

    Outside the main thread, where Python has no signals, nothing changes and the flag stays unset.

    Yields:
        A function that tells whether somebody asked to stop.

    Example:
        >>> with stop_request() as requested:
        ...     requested()
        False
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        restore()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore()
