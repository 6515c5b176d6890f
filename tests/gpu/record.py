"""The record of a GPU, one JSON file: each entry is written as soon as it is measured, so that a run can go on."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments.common.atomic import write_atomically
from tests.gpu.machine import file_name


class Record:
    """What was measured on one device with one state of the sources.

    Args:
        folder: Of the records.
        host: As ``machine.describe`` gives it.
        sources: Digest of what was measured; entries of others are dropped.
    """

    def __init__(self, folder: Path, host: dict[str, Any], sources: str) -> None:
        self.path = folder / file_name(host)
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = known.get("host") == host and known.get("sources") == sources
        self.content: dict[str, Any] = known if same else {"host": host, "sources": sources, "entries": {}}

    def has(self, name: str) -> bool:
        return name in self.content["entries"]

    def get(self, name: str) -> Any:
        return self.content["entries"][name]

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Write an entry, with its date."""
        date = datetime.now(timezone.utc).date().isoformat()
        self.content["entries"][name] = {"date": date, **entry}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())
