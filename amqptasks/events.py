"""What happens to tasks and processes, as typed events, and the bus that carries them.

Logs, Sentry and metrics subscribe; the code that emits knows none of them. A handler that raises is dropped from the
event, reported once on the `amqptasks.events` logger, and harms nothing.

| event | when | where |
|---|---|---|
| `TaskReceived` | an executor is about to run a task | executor |
| `TaskSucceeded` | it returned | executor |
| `TaskRetrying` | it will run again | executor |
| `TaskFailed` | it will be dead-lettered | executor, or leader for what never ran |
| `TaskRevoked` | it will be dead-lettered: revoked, or expired | leader |
| `ExecutorStarted` | after the fork, before the first task | executor |
| `ExecutorStopping` | before it exits | executor |
| `BeatTick` | a periodic call was sent, and the broker has it | the beat that leads |
| `BeatPulse` | every second | every beat |
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from amqptasks.outcome import Reason

__all__ = [
    "BeatPulse",
    "BeatTick",
    "Bus",
    "ExecutorStarted",
    "ExecutorStopping",
    "TaskEvent",
    "TaskFailed",
    "TaskReceived",
    "TaskRetrying",
    "TaskRevoked",
    "TaskSucceeded",
]


@dataclass(slots=True)
class TaskEvent:
    """Common to all task events. `attempt` counts from 1."""

    task: str
    task_id: str
    queue: str
    attempt: int


@dataclass(slots=True)
class TaskReceived(TaskEvent):
    """A task is about to run."""


@dataclass(slots=True)
class TaskSucceeded(TaskEvent):
    """A task returned `result` after `runtime` seconds."""

    runtime: float
    result: Any


@dataclass(slots=True)
class TaskRetrying(TaskEvent):
    """A task will run again in `delay` seconds."""

    runtime: float
    delay: float
    exception: str


@dataclass(slots=True)
class TaskFailed(TaskEvent):
    """A task goes to its dead-letter queue. `exception` is None where no Python exception was raised here."""

    runtime: float
    reason: Reason
    message: str
    traceback: str
    exception: BaseException | None
    #: The task named this exception in `throws`: expected, so no traceback and no Sentry report.
    expected: bool = False


@dataclass(slots=True)
class TaskRevoked(TaskEvent):
    """A task goes to its dead-letter queue because nobody wants it any more.

    `terminated`: it ran, and `signum` ended it. `expired`: its time was over; else somebody revoked it.
    """

    terminated: bool
    signum: int | None
    expired: bool
    message: str


@dataclass(slots=True)
class ExecutorStarted:
    """An executor process began. It is the place to open what must not cross a fork."""

    queue: str


@dataclass(slots=True)
class ExecutorStopping:
    """An executor process is about to exit."""

    queue: str


@dataclass(slots=True)
class BeatTick:
    """A periodic call was sent. `due` is when it was to be, `sent` when it was; both are aware of their zone."""

    schedule: str
    task: str
    task_id: str
    due: datetime
    sent: datetime


@dataclass(slots=True)
class BeatPulse:
    """A beat lives. It leads, or stands by while it is connected; `last_tick` is that of this process.

    `next_due` is when it is to send the next tick; None while it stands by, or has none to send.
    """

    connected: bool
    leads: bool
    entries: int
    last_tick: datetime | None
    next_due: datetime | None = None


E = TypeVar("E")
_log = logging.getLogger("amqptasks.events")


class Bus:
    """Carries events to handlers, in the order in which they subscribed."""

    def __init__(self) -> None:
        self._handlers: dict[type, list[Callable[[Any], None]]] = {}
        self._flushers: list[Callable[[], None]] = []

    def subscribe(self, kind: type[E], handler: Callable[[E], None]) -> None:
        """Call `handler` for every event of exactly this kind."""
        self._handlers.setdefault(kind, []).append(handler)

    def wants(self, kind: type) -> bool:
        """Whether anyone listens, so that the hot path need not build events in vain."""
        return kind in self._handlers

    def emit(self, event: object) -> None:
        """Give `event` to its handlers."""
        for handler in self._handlers.get(type(event), ()):
            try:
                handler(event)
            except Exception:
                _log.exception("a handler of %s raised", type(event).__name__)

    def on_flush(self, flush: Callable[[], None]) -> None:
        """Call `flush` when a batch of work is done: handlers that buffer write then."""
        self._flushers.append(flush)

    def flush(self) -> None:
        """A batch of work is done."""
        for flush in self._flushers:
            flush()
