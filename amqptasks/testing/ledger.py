"""The ledger: what was really executed, told by the tasks themselves. One `O_APPEND` write a line.

A task calls `record(self.request.id, "done")`; the file is named by the environment variable ``LEDGER``. Afterwards
`Ledger.judge` says what was lost, run again, or run too early.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PATH_VARIABLE", "Entry", "Judgement", "Ledger", "record"]

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


@dataclass(frozen=True)
class Judgement:
    """What became of the tasks that were sent. `pause` is the longest time in seconds without any that ended."""

    lost: frozenset[str]
    again: int
    early: frozenset[str]
    pause: float


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

    def judge(self, sent: Mapping[str, float], dead: Collection[str] = (), event: str = "done") -> Judgement:
        """Compare with what was sent: task id -> the time (seconds of the epoch) before which it may not run.

        `dead` are the ids in dead-letter queues; only what is neither there nor has ended is lost.
        """
        runs: Counter[str] = Counter()
        early, times = set(), []
        for entry in self.entries(event):
            if entry.task_id in sent:
                runs[entry.task_id] += 1
                times.append(entry.at)
                if entry.at < sent[entry.task_id]:
                    early.add(entry.task_id)
        times.sort()
        return Judgement(
            lost=frozenset(sent) - set(runs) - set(dead),
            again=sum(count - 1 for count in runs.values()),
            early=frozenset(early),
            pause=max((later - sooner for sooner, later in itertools.pairwise(times)), default=0.0),
        )
