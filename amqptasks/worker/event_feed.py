"""Events about tasks, made by the leader: it knows what came, what runs and what became of it.

They are gathered and published in lists, on the leader's publishing connection without confirms. A task never waits
for its events: what the broker does not take at once is dropped and counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from amqptasks.broker.event_channel import EventChannel
from amqptasks.broker.link import Link
from amqptasks.broker.sent_events import sent_fields
from amqptasks.message import Envelope
from amqptasks.outcome import Failed, GivenBack, Lost, Outcome, Reason, Retrying, Succeeded
from amqptasks.protocol.events import EXCHANGE, MOST, TASKS, described, utcoffset
from amqptasks.worker.delivery import Delivery, Told
from amqptasks.worker.event_switch import EventSwitch

__all__ = ["EventFeed"]

_FLUSH_SECONDS = 0.5
#: So many events wait for the channel when events were turned on just now.
_MOST_WAITING = 1000
_WARN_SECONDS = 60.0
#: (delivery, pid, seconds that it has run) of what runs now.
Running = Callable[[], Sequence[tuple[Delivery, int, float]]]

_log = structlog.get_logger("amqptasks.worker")


class EventFeed:
    """One queue's task events. Belongs to the leader's loop."""

    def __init__(self, switch: EventSwitch, link: Link, node: str, send_sent: bool) -> None:
        self._switch = switch
        self._send_sent = send_sent
        self._channel = EventChannel(link, node)
        self._loop = link.loop
        #: Set by who knows the executors.
        self.running: Running = tuple
        #: Common to all events: whoever speaks for the worker is its supervisor, for monitors.
        self._common = {"hostname": node, "pid": os.getppid(), "utcoffset": utcoffset()}
        self._events: list[dict[str, Any]] = []
        #: Events of the application's own, which are sent whether others are or not.
        self._custom: list[Envelope] = []
        self._ticking = False
        self._warned_at = 0.0
        self.sent = 0
        self.dropped = 0

    # -- what happens ---------------------------------------------------------------------------------------------

    def received(self, delivery: Delivery) -> None:
        """A delivery was accepted."""
        if self._switch.on and delivery.told is Told.NOTHING:
            self._received(delivery, time.time())

    def settled(self, delivery: Delivery, outcome: Outcome, runtime: float) -> None:
        """A delivery has this outcome, after so many seconds; 0 for what did not run."""
        if self._send_sent:
            # What follows a task is called by this process.
            for message in getattr(outcome, "messages", ()):
                if "task" in message.headers:
                    self._add("task-sent", time.time(), sent_fields(message))
        if not self._switch.on:
            return
        uuid = delivery.headers.get("id")
        if not isinstance(uuid, str) or (isinstance(outcome, GivenBack) and not runtime):
            return
        now = time.time()
        ran = runtime > 0 and delivery.verdict is None
        if delivery.told is Told.NOTHING and not isinstance(outcome, Lost):
            # Refused at once, or here since before events were turned on: monitors need its name.
            self._received(delivery, now - runtime)
        if ran and delivery.told is not Told.STARTED:
            self._started(delivery, now - runtime)
        kind, fields = _told(outcome, runtime if ran else None, started=delivery.told is Told.STARTED)
        if kind:
            self._add(kind, now, {"uuid": uuid, **fields})

    def _received(self, delivery: Delivery, when: float) -> None:
        delivery.told = Told.RECEIVED
        self._add("task-received", when, described(delivery.headers))

    def _started(self, delivery: Delivery, when: float) -> None:
        delivery.told = Told.STARTED
        self._add("task-started", when, {"uuid": delivery.headers.get("id")})

    def took(self, message: Envelope) -> bool:
        """Whether what a running task sends is an event. Then it is sent with the others."""
        if message.exchange != EXCHANGE:
            return False
        if len(self._custom) < _MOST_WAITING:
            self._custom.append(message)
            self._wake()
        else:
            self._dropped(1)
        return True

    # -- sending --------------------------------------------------------------------------------------------------

    def _add(self, kind: str, when: float, fields: dict[str, Any]) -> None:
        self._events.append({"type": kind, "timestamp": when, "clock": self._switch.tick(), **self._common, **fields})
        self._wake()
        if len(self._events) >= MOST and not self._channel.opening:
            self.flush()

    def _wake(self) -> None:
        if not self._ticking:
            self._ticking = True
            self._channel.open()
            self._loop.call_later(_FLUSH_SECONDS, self._tick)

    def _tick(self) -> None:
        self._ticking = self._switch.on or self._channel.opening
        if self._ticking:
            self._loop.call_later(_FLUSH_SECONDS, self._tick)
            self._common["utcoffset"] = utcoffset()
            now = time.time()
            for delivery, _pid, ran in self.running():
                if delivery.told is Told.RECEIVED and delivery.verdict is None:
                    self._started(delivery, now - ran)
        if not self._channel.opening or len(self._events) > _MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Send what is gathered, or drop it."""
        events, self._events = self._events, []
        for start in range(0, len(events), MOST):
            some = events[start : start + MOST]
            if self._channel.send(TASKS, some):
                self.sent += len(some)
            else:
                self._dropped(len(some))
        custom, self._custom = self._custom, []
        for one in custom:
            if self._channel.send_encoded(one.routing_key, one.body):
                self.sent += 1
            else:
                self._dropped(1)

    def _dropped(self, count: int) -> None:
        self.dropped += count
        now = time.monotonic()
        if not self._warned_at or now - self._warned_at > _WARN_SECONDS:
            self._warned_at = now
            _log.warning("The broker does not take events: they are dropped", dropped=self.dropped, sent=self.sent)


def _told(outcome: Outcome, runtime: float | None, *, started: bool) -> tuple[str, dict[str, Any]]:
    """Type and fields of the event that tells of an outcome; no type where Celery tells nothing."""
    match outcome:
        case Succeeded():
            return "task-succeeded", {"result": outcome.shown, "runtime": runtime}
        case Retrying():
            return "task-retried", {"exception": outcome.message, "traceback": outcome.traceback}
        case Failed(Reason.EXPIRED | Reason.REVOKED as reason):
            fields = {"terminated": started, "signum": outcome.signum, "expired": reason is Reason.EXPIRED}
            return "task-revoked", fields
        case Failed(Reason.REJECTED):
            return "task-rejected", {"requeue": False}
        case Failed():
            return "task-failed", {"exception": _shown(outcome), "traceback": outcome.traceback}
        case Lost(description):
            return "task-retried", {"exception": f"WorkerLost({description!r})", "traceback": ""}
        case GivenBack():
            return "task-rejected", {"requeue": True}
    return "", {}


def _shown(failed: Failed) -> str:
    """As `repr` shows an exception: monitors take the class from what stands before the parenthesis."""
    return f"{failed.exception.rpartition('.')[2] or 'Exception'}({failed.message!r})"
