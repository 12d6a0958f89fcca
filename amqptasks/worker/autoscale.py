"""How many tasks at once: more while there is a backlog, fewer after half a minute in which nobody needed them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from amqptasks.worker.dispatch import Dispatcher

__all__ = ["Autoscaler", "Load", "wanted"]

#: Growth waits so long for what it changed to show.
_GROW_SECONDS = 0.5
#: Idle for so long, a slot goes.
_IDLE_SECONDS = 30.0

_log = structlog.get_logger("amqptasks.worker")


@dataclass(slots=True)
class Load:
    """What is known of a group's load."""

    #: Tasks that may run at once.
    slots: int
    #: Slots that have work now.
    engaged: int
    #: Whether more waits than runs: in the leader, or in the broker behind a prefetch that is used up.
    backlog: bool
    #: Most slots that had work at a time in the last `_IDLE_SECONDS`; None while that time is not over.
    peak: int | None


def wanted(load: Load, most: int, least: int) -> int:
    """How many slots there should be. Pure.

    With a backlog and every slot at work, twice as many. When fewer were ever at work, so many and one to spare, so
    that a steady load does not make it grow and shrink in turn.
    """
    if load.backlog and load.engaged >= load.slots:
        return max(least, min(most, load.slots * 2))
    if load.peak is not None and load.peak + 1 < load.slots:
        return max(least, min(most, load.peak + 1 if load.peak else least))
    return max(least, min(most, load.slots))


class Autoscaler:
    """Resizes a dispatcher, between `least` and `most`, which may be changed. Belongs to the leader's loop."""

    def __init__(self, dispatcher: Dispatcher, most: int, least: int) -> None:
        self._dispatcher = dispatcher
        self.most = most
        self.least = least
        self._changed_at = time.monotonic()
        self._peak = 0
        self._peak_since = self._changed_at

    def tick(self, prefetch: int, *, paused: bool) -> None:
        """Look, several times a second; `prefetch` is what the leader may hold now."""
        dispatcher, now = self._dispatcher, time.monotonic()
        waiting = len(dispatcher.waiting)
        engaged = dispatcher.engaged
        self._peak = max(self._peak, engaged)
        peak = None
        if now - self._peak_since > _IDLE_SECONDS:
            peak, self._peak, self._peak_since = self._peak, engaged, now
        backlog = paused or waiting > 0 or dispatcher.busy >= prefetch
        load = Load(dispatcher.concurrency, engaged, backlog, peak)
        slots = wanted(load, self.most, self.least)
        if slots == load.slots or (slots > load.slots and now - self._changed_at < _GROW_SECONDS):
            return
        self._changed_at = now
        _log.info("Autoscale", slots=slots, before=load.slots, engaged=engaged, waiting=waiting)
        dispatcher.resize(slots)
