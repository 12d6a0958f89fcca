"""The ledger: what was really executed, told by the tasks themselves. One `O_APPEND` write a line."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

PATH_VARIABLE = "LEDGER"


def record(task_id: str | None, event: str, attempt: int = 1) -> None:
    """Add a line. Safe from any process."""
    line = f"{task_id},{attempt},{os.getpid()},{time.time():.6f},{event}\n"
    descriptor = os.open(os.environ[PATH_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Entry:
    """One line."""

    task_id: str
    attempt: int
    pid: int
    at: float
    event: str


class Ledger:
    """Reads the lines back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, event: str | None = None) -> list[Entry]:
        """All lines, or those of one event."""
        if not self.path.exists():
            return []
        rows = (line.split(",", 4) for line in self.path.read_text().splitlines())
        found = [Entry(row[0], int(row[1]), int(row[2]), float(row[3]), row[4]) for row in rows]
        return [entry for entry in found if event is None or entry.event == event]

    def ids(self, event: str = "done") -> set[str]:
        """The ids that have a line of this event."""
        return {entry.task_id for entry in self.entries(event)}
