"""One timer for the deadlines of all messages that wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from amqptasks.broker.pending import Pending

__all__ = ["Deadlines"]


class Deadlines:
    """Wakes at the earliest deadline, and not before: a hundred thousand waiting messages cost nothing meanwhile.

    Args:
        loop: pika's I/O loop.
        blocked_timeout: seconds that a message may wait under an alarm of the broker.
        waiting: all messages.
        expire: called with each whose time is over.
        swept: called after a sweep, with the number of those.
    """

    def __init__(
        self,
        loop: Any,
        *,
        blocked_timeout: float,
        blocked_since: Callable[[], float | None],
        waiting: Callable[[], Iterable[Pending]],
        expire: Callable[[Pending], None],
        swept: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._blocked_timeout = blocked_timeout
        self._blocked_since = blocked_since
        self._waiting = waiting
        self._expire = expire
        self._swept = swept
        self._timer: Any = None
        #: When the timer fires.
        self.due = math.inf

    def plan(self, due: float) -> None:
        """Sweep at this time (`time.monotonic`), unless one comes earlier."""
        if due < self.due:
            if self._timer is not None:
                self._loop.remove_timeout(self._timer)
            self.due = due
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._sweep)

    def plan_blocked(self) -> None:
        """The broker has an alarm, and a message waits from now on at the latest."""
        self.plan(time.monotonic() + self._blocked_timeout)

    def _sweep(self) -> None:
        now, blocked = time.monotonic(), self._blocked_since()
        self._timer, self.due = None, math.inf
        due, expired = math.inf, 0
        for pending in list(self._waiting()):
            if pending.done is None or pending.deadline is None:
                continue
            end = pending.deadline
            if blocked is not None:
                end = min(end, max(blocked, pending.since) + self._blocked_timeout)
            if now < end:
                due = min(due, end)
            else:
                expired += 1
                self._expire(pending)
        self.plan(due)
        self._swept(expired)
