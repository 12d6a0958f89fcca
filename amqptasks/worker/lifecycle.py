"""A worker's life, told: to the handlers of its signals, and to the service manager that started it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import structlog

from amqptasks import signals
from amqptasks.app import AmqpTasks
from amqptasks.events import Bus, ExecutorStarted, ExecutorStopping
from amqptasks.worker.notify import Notifier

__all__ = ["Lifecycle", "WorkerInfo", "subscribe_process_signals"]

_HEARTBEAT_SECONDS = 2.0
#: While a handler runs, the supervisor does nothing else.
_HANDLER_SECONDS = 10.0
_log = structlog.get_logger("amqptasks.worker")


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The worker, as the sender of its signals."""

    app: AmqpTasks
    hostname: str
    queues: tuple[str, ...] = ()
    pid: int = field(default_factory=os.getpid)


class Lifecycle:
    """What the supervisor reports of itself. Everything here runs in the supervisor's process."""

    def __init__(self, worker: WorkerInfo, notifier: Notifier) -> None:
        self._worker = worker
        self._notifier = notifier
        self._ready = False
        self._alive_at = self._beat_at = 0.0

    def starting(self) -> None:
        """Before the first fork: what handlers set up here, all processes share."""
        signals.worker_init.send(sender=self._worker)
        _warn_of_threads()
        self._notifier.status("Waiting for the broker")

    def ready(self) -> None:
        """All queues are consumed."""
        self._ready = True
        self._notifier.ready(f"Consuming {', '.join(self._worker.queues)}")
        self._tell(signals.worker_ready, self._worker)

    def reloading(self) -> None:
        """New code is tried."""
        self._notifier.reloading()

    def reload_failed(self) -> None:
        """It does not start: the old goes on."""
        self._notifier.ready("Consuming; the new code did not start")

    def stopping(self, number: int, exit_code: int) -> None:
        """A signal asked to stop; `exit_code` is not 0 where running tasks do not get their time."""
        self._ready = False
        how = "Cold" if exit_code else "Warm"
        self._notifier.stopping("Stopping: running tasks finish" if how == "Warm" else "Stopping now")
        name = signal.Signals(number).name
        self._tell(signals.worker_shutting_down, self._worker.hostname, sig=name, how=how, exitcode=exit_code)

    def stopped(self) -> None:
        """Leaders and executors are gone."""
        self._tell(signals.worker_shutdown, self._worker)

    # -- signs of life --------------------------------------------------------------------------------------------

    def tick(self, consuming: bool) -> None:
        """A turn of the supervisor's loop; `consuming`: all leaders are up."""
        now = time.monotonic()
        interval = self._notifier.interval
        if interval is not None and now >= self._alive_at + interval:
            self._alive_at = now
            self._notifier.alive()
        if signals.heartbeat_sent.receivers and now >= self._beat_at + _HEARTBEAT_SECONDS:
            self._beat_at = now
            if self._ready and consuming:
                self._tell(signals.heartbeat_sent, self._worker)

    @property
    def next_tick(self) -> float | None:
        """When `tick` has something to do (`time.monotonic`); None for never."""
        due = []
        if self._notifier.interval is not None:
            due.append(self._alive_at + self._notifier.interval)
        if signals.heartbeat_sent.receivers:
            due.append(self._beat_at + _HEARTBEAT_SECONDS)
        return min(due, default=None)

    def _tell(self, one: signals.Signal, sender: Any, **named: Any) -> None:
        if one.receivers:
            with _at_most(_HANDLER_SECONDS, one.name):
                _contained(one.name, lambda: one.send(sender=sender, **named))


def subscribe_process_signals(bus: Bus) -> None:
    """Send `worker_process_init` and `worker_process_shutdown` in executors."""

    def started(_event: ExecutorStarted) -> None:
        _contained("worker_process_init", lambda: signals.worker_process_init.send(sender=None))

    def stopping(_event: ExecutorStopping) -> None:
        ended = signals.worker_process_shutdown
        _contained(ended.name, lambda: ended.send(sender=None, pid=os.getpid(), exitcode=0))

    bus.subscribe(ExecutorStarted, started)
    bus.subscribe(ExecutorStopping, stopping)


def _contained(name: str, send: Callable[[], object]) -> None:
    """Not even `SystemExit` of a handler ends the process."""
    try:
        send()
    except BaseException:
        _log.exception(f"A handler of {name} raised")


def _warn_of_threads() -> None:
    """Of threads that the application has started: a child has a copy of each lock, and nobody who lets go of it."""
    ours = ("MainThread", "amqptasks-")
    names = sorted(one.name for one in threading.enumerate() if not one.name.startswith(ours))
    if names:
        _log.warning(
            "Threads of the application run in the supervisor: what they lock while it forks stays locked in "
            "executors. Start them in worker_process_init",
            threads=names[:10],
        )


@contextmanager
def _at_most(seconds: float, name: str) -> Iterator[None]:
    """Raise `TimeoutError` inside, after so many seconds. On the main thread."""

    def over(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"handlers of {name} get {seconds:g} s: the supervisor waits for them")

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:  # it came between the last handler and the line above
        return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
