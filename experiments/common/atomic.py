"""Write files in one step."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that readers, and whoever comes after a crash, see the old content or the new, never a part.

    Args:
        path: The file; its folder must exist.
        content: What it shall hold.

    Raises:
        OSError: If the content could not be written, for example on a full disk; the old content stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
