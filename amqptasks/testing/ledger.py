"""The ledger: what was really promised and executed, told by those who did it. One `O_APPEND` write a line.

The file is named by the environment variable ``LEDGER``. Whoever publishes calls `record_confirmed` as soon as a call
has returned, a task `record(self.request.id, "done")` as its last act; neither loses its line when it is killed
afterwards. `Ledger.judge` says what was lost, run again, run too early, dead-lettered, or never acknowledged:

    verdict = Ledger(path).judge(dead=ids_in_dead_letter_queues, held=messages_left_in_queues)
    assert verdict.flawless, verdict
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PATH_VARIABLE", "Entry", "Judgement", "Ledger", "record", "record_confirmed"]

PATH_VARIABLE = "LEDGER"
_CONFIRMED = "confirmed="


def record(task_id: str | None, event: str, attempt: int = 1) -> None:
    """Add a line. Safe from any process."""
    line = f"{task_id},{attempt},{os.getpid()},{time.time():.6f},{event}\n"
    descriptor = os.open(os.environ[PATH_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def record_confirmed(task_id: str, not_before: float) -> None:
    """Add that a call has returned, and so was confirmed; its task may not run before that second of the epoch."""
    record(task_id, f"{_CONFIRMED}{not_before:.6f}")


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
    """What became of the tasks whose call had returned.

    Attributes:
        lost: neither ended nor set aside.
        gone: the same, but they may have stood in a queue when it was deleted.
        dead: all that stand in a dead-letter queue, though they may have ended too.
        kept: all that came when their queue was not there, and wait as unroutable.
        held: so many messages the broker has still: nobody acknowledged them.
        early: ended before they were due.
        again: so many more runs ended than there are tasks.
        pause: the longest time in seconds in which no task ended.
    """

    lost: frozenset[str]
    again: int
    early: frozenset[str]
    pause: float
    dead: frozenset[str] = frozenset()
    held: int = 0
    gone: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    @property
    def flawless(self) -> bool:
        """Whether nothing happened that must not, where all tasks work and nobody deletes a queue: some ran again."""
        return not (self.lost or self.gone or self.early or self.dead or self.kept or self.held)


class Ledger:
    """Reads the lines back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, event: str | None = None) -> list[Entry]:
        """All lines, or those of one event."""
        if not self.path.exists():
            return []
        # Without the line that somebody is writing: its first half is to be seen before the rest.
        written, _, _ = self.path.read_text().rpartition("\n")
        rows = (line.split(",", 4) for line in written.splitlines())
        found = [Entry(row[0], int(row[1]), int(row[2]), float(row[3]), row[4]) for row in rows]
        return [entry for entry in found if event is None or entry.event == event]

    def ids(self, event: str = "done") -> set[str]:
        """The ids that have a line of this event."""
        return {entry.task_id for entry in self.entries(event)}

    def confirmed(self) -> dict[str, float]:
        """What publishers have recorded: task id -> the second of the epoch before which it may not run."""
        return {
            entry.task_id: float(entry.event.removeprefix(_CONFIRMED))
            for entry in self.entries()
            if entry.event.startswith(_CONFIRMED)
        }

    def clear(self) -> None:
        """Begin anew. Who writes goes on with a new file."""
        self.path.unlink(missing_ok=True)

    def judge(
        self,
        sent: Mapping[str, float] | None = None,
        dead: Collection[str] = (),
        event: str = "done",
        *,
        kept: Collection[str] = (),
        held: int = 0,
        deleted: float = 0.0,
        until: float = math.inf,
    ) -> Judgement:
        """Compare what was promised with what has ended.

        Args:
            sent: task id -> the second of the epoch before which it may not run; by default what is `confirmed`.
            dead: the ids in dead-letter queues.
            event: what tasks record when they end.
            kept: the ids in queues for what is unroutable.
            held: how many messages the broker has still, when it should have none.
            deleted: when a queue was deleted. What was due before may have stood in it.
            until: when there was work no more. A pause after it is none.
        """
        promised = self.confirmed() if sent is None else sent
        runs: Counter[str] = Counter()
        early, times = set(), []
        for entry in self.entries(event):
            if entry.task_id in promised:
                runs[entry.task_id] += 1
                times.append(entry.at)
                if entry.at < promised[entry.task_id]:
                    early.add(entry.task_id)
        times = sorted([one for one in times if one < until] + ([until] if until < math.inf else []))
        missing = frozenset(promised) - set(runs) - set(dead) - set(kept)
        gone = frozenset(one for one in missing if promised[one] <= deleted)
        return Judgement(
            lost=missing - gone,
            again=sum(count - 1 for count in runs.values()),
            early=frozenset(early),
            pause=max((later - sooner for sooner, later in itertools.pairwise(times)), default=0.0),
            dead=frozenset(dead),
            held=held,
            gone=gone,
            kept=frozenset(kept),
        )
