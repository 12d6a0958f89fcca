"""Before the worker's first fork: the topology is declared, with patience for a broker that is not there yet."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.config import Settings
from amqptasks.errors import BrokerUnreachable
from amqptasks.worker.health import Snapshot, starting
from amqptasks.worker.listening import Listening
from amqptasks.worker.metrics import CONTENT_TYPE_LATEST, Exposition
from amqptasks.worker.process import fork_child
from amqptasks.worker.stacks import dump_on_signal
from amqptasks.worker.web import Page, serve, verdict_page

__all__ = ["Interrupted", "wait_for_broker"]

_log = structlog.get_logger("amqptasks.worker")


class Interrupted(Exception):
    """A signal asked to stop before the worker had started."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def wait_for_broker(
    app: AmqpTasks,
    hostname: str = "",
    listening: Listening | None = None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Declare the topology; while no node answers, try again with back-off, and say so, also over HTTP.

    `tick` is called meanwhile.

    Raises `BrokerUnreachable` after ``broker.connection_max_retries``, at once with
    ``connection_retry_on_startup: false``; `AccessRefused` and `TopologyConflict` at once; `Interrupted` on a signal.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    numbers = (signal.SIGTERM, signal.SIGINT)
    with _answering(listening, app.settings, hostname):
        previous = {number: signal.signal(number, interrupt) for number in numbers}
        try:
            dump_on_signal()
            # A program that took over from its own old code held them back until somebody was there to act on them.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (*numbers, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1))
            _declare_with_patience(app, app.settings, tick)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def _answering(listening: Listening | None, settings: Settings, hostname: str) -> Iterator[None]:
    """Probes are answered meanwhile, by a process of its own: whoever starts the worker sees that it waits."""
    if listening is None:
        yield
        return

    metrics = Exposition(settings, hostname, time.time(), None)
    pages: dict[str, Callable[[], Page]] = {path: verdict_page(verdict) for path, verdict in starting(hostname).items()}
    pages["/metrics"] = lambda: Page(200, CONTENT_TYPE_LATEST, metrics.page({}, Snapshot(0.0), ready=False))

    def answer() -> int:
        serve(listening.socket, pages)
        return 0

    pid = fork_child(answer, keep=listening.descriptors)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _declare_with_patience(app: AmqpTasks, settings: Settings, tick: Callable[[], None]) -> None:
    broker = settings.broker
    attempt = 0
    while True:
        try:
            app.declare()
            return
        except BrokerUnreachable as error:
            limit = broker.connection_max_retries if broker.connection_retry_on_startup else 0
            if limit is not None and attempt >= limit:
                raise
            pause = min(30.0, 0.5 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1.0)
            attempt += 1
            _log.warning(
                "Cannot reach the broker; trying again",
                error=str(error),
                seconds=round(pause, 1),
                attempt=attempt,
                of=limit if limit is not None else "unlimited",
            )
            until = time.monotonic() + pause
            while (left := until - time.monotonic()) > 0:
                tick()
                time.sleep(min(left, 0.2))
