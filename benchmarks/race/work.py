"""What the tasks of all systems do, and how a worker is told where it races. Imported by workers: light, no library."""

from __future__ import annotations

import os
import time

__all__ = ["MARK_BYTES", "MARK_EVERY", "PAUSE", "QUEUE", "REDIS", "TYPE", "URL", "WORK", "mark", "spin"]

URL = os.environ.get("RACE_URL", "amqp://guest:guest@localhost:5672/")
QUEUE = os.environ.get("RACE_QUEUE", "race")
#: quorum or classic
TYPE = os.environ.get("RACE_TYPE", "quorum")
#: What this worker or client is for: noop, wait, cpu or trip.
WORK = os.environ.get("RACE_WORK", "noop")
#: Where results are kept by systems that have none over AMQP.
REDIS = os.environ.get("RACE_REDIS", "redis://localhost:6379/0")
#: So many rounds of an empty loop take a millisecond of CPU time.
_ROUNDS = int(os.environ.get("RACE_SPIN", "30000"))
#: Seconds that a waiting task waits.
PAUSE = 0.01
#: One task in so many writes down when it ran: a line of so many bytes.
MARK_EVERY, MARK_BYTES = 100, 18

_marks: int | None = None


def mark() -> None:
    """Write the time, in one system call, to a file that all processes of a worker share."""
    global _marks  # noqa: PLW0603
    if _marks is None:
        _marks = os.open(os.environ["RACE_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(_marks, b"%017.6f\n" % time.time())


def spin() -> None:
    """Compute for a millisecond, were it alone on its core."""
    for _ in range(_ROUNDS):
        pass
