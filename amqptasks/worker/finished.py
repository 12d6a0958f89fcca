"""Which chords are done: known to the joiner that is active and, by messages in its queue, to the one after it.

A part can come after its chord's body was sent: its process died between the part's confirm and the task's ack, so
the task ran again. Without a memory that outlives the joiner, that part would be the first of a chord that never
completes. So each chord that is done leaves a *marker*, confirmed before its parts are acknowledged. It stays
unacknowledged with the joiner, goes to the next one when this one dies, and is dropped when it is old.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from amqptasks.errors import PublishError

__all__ = ["Finished"]

#: So many chords are remembered, so many go into one message, and above so many messages the oldest are put together.
_REMEMBERED, _IN_A_MESSAGE, _MESSAGES = 100_000, 1_000, 1_000
_RETRY_SECONDS = 1.0
_log = structlog.get_logger("amqptasks.worker")

Publish = Callable[[Mapping[str, Any], Callable[[PublishError | None], None]], None]


@dataclass(frozen=True, slots=True)
class _Marker:
    """An unacknowledged message, and the chords that it names."""

    ids: list[str]
    ack: Callable[[], None]


class Finished:
    """The chords that are done.

    Args:
        publish: publishes a table to the joiner's queue and calls back with None when it is confirmed.
        lifetime: seconds that a chord is remembered.
    """

    def __init__(
        self, publish: Publish, call_later: Callable[[float, Callable[[], None]], Any], *, lifetime: float
    ) -> None:
        self._publish = publish
        self._call_later = call_later
        self._lifetime = lifetime
        #: When each was done, in seconds of the epoch: markers are read by other processes.
        self._times: OrderedDict[str, float] = OrderedDict()
        self._markers: list[_Marker] = []
        self._waiting: list[tuple[str, Callable[[], None]]] = []
        self._publishing = self._merging = False

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._times

    def add(self, group_id: str, then: Callable[[], None]) -> None:
        """Remember a chord; `then` is called when its marker is confirmed."""
        self._waiting.append((group_id, then))
        self._flush()

    def message(self, done: Mapping[str, float], ack: Callable[[], None]) -> None:
        """A marker came, of this process or of one before it."""
        for group_id, when in done.items():
            self._remember(str(group_id), float(when))
        self._markers.append(_Marker([str(group_id) for group_id in done], ack))
        if len(self._markers) > _MESSAGES and not self._merging:
            self._merge()

    def lost(self) -> None:
        """The connection is gone: the markers come again, here or elsewhere."""
        self._markers.clear()

    def tick(self) -> None:
        """Forget what is old."""
        oldest = time.time() - self._lifetime
        while self._times and next(iter(self._times.values())) < oldest:
            self._times.popitem(last=False)
        kept = []
        for marker in self._markers:
            if any(group_id in self._times for group_id in marker.ids):
                kept.append(marker)
            else:
                marker.ack()
        self._markers = kept

    def _remember(self, group_id: str, when: float) -> None:
        self._times[group_id] = when
        if len(self._times) > _REMEMBERED:
            self._times.popitem(last=False)

    def _flush(self) -> None:
        """Publish one message for all that wait; what comes meanwhile goes into the next."""
        if self._publishing or not self._waiting:
            return
        batch, self._waiting = self._waiting[:_IN_A_MESSAGE], self._waiting[_IN_A_MESSAGE:]
        now = time.time()
        self._publishing = True

        def done(error: PublishError | None) -> None:
            self._publishing = False
            if error is not None:
                _log.error("That chords are done cannot be kept; trying again", chords=len(batch), error=str(error))
                self._waiting = batch + self._waiting
                self._call_later(_RETRY_SECONDS, self._flush)
                return
            for group_id, then in batch:
                self._remember(group_id, now)
                then()
            self._flush()

        self._publish({"done": {group_id: now for group_id, _ in batch}}, done)

    def _merge(self) -> None:
        """Put the small markers into one message, and acknowledge them when it is confirmed."""
        some: list[_Marker] = []
        ids: dict[str, float] = {}
        for marker in self._markers:
            if len(marker.ids) < _IN_A_MESSAGE // 2 and len(ids) + len(marker.ids) <= _IN_A_MESSAGE:
                some.append(marker)
                ids.update((one, self._times[one]) for one in marker.ids if one in self._times)
        if len(some) < 2:
            return
        self._merging = True

        def done(error: PublishError | None) -> None:
            self._merging = False
            if error is not None:
                _log.error("Markers of chords cannot be put together", error=str(error))
                return
            gone = set(map(id, some))
            self._markers = [marker for marker in self._markers if id(marker) not in gone]
            for marker in some:
                marker.ack()

        self._publish({"done": ids}, done)
