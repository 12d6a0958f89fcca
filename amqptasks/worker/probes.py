"""What the desk says over HTTP: probes and metrics. The server has threads; the desk's loop asks and knows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from amqptasks.app import AmqpTasks
from amqptasks.worker.board import Counts
from amqptasks.worker.depths import Depths
from amqptasks.worker.health import Ask, Health
from amqptasks.worker.listening import Listening
from amqptasks.worker.metrics import CONTENT_TYPE_LATEST, Exposition
from amqptasks.worker.web import Page, json_page, serve, verdict_page

__all__ = ["Probes"]

#: The supervisor adds up the boards in milliseconds.
_PATIENCE = 2.0


class _Loop(Protocol):
    def call_later(self, delay: float, callback: Callable[[], None]) -> Any: ...

    def add_callback_threadsafe(self, callback: Callable[[], None]) -> Any: ...


class _Setup(Protocol):
    @property
    def app(self) -> AmqpTasks: ...

    @property
    def hostname(self) -> str: ...

    @property
    def started(self) -> float: ...


class Probes:
    """The server and what it serves.

    Args:
        ask: asks the supervisor; belongs to the loop.
    """

    def __init__(self, setup: _Setup, listening: Listening, loop: _Loop, ask: Ask) -> None:
        settings = setup.app.settings
        self._listening = listening
        self._loop = loop
        self._ask = ask
        self._health = Health(setup.hostname, ask, loop.call_later)
        self._depths = Depths(settings) if settings.broker.management_url is not None else None
        self._exposition = Exposition(settings, setup.hostname, setup.started, self._depths)

    def start(self) -> None:
        """Serve from now on."""
        self._health.start()
        if self._depths is not None:
            self._depths.start()
        pages = {
            "/livez": verdict_page(self._health.live),
            "/readyz": verdict_page(self._health.ready),
            "/startupz": verdict_page(self._health.started),
            "/metrics": self._metrics,
        }
        threading.Thread(target=serve, args=(self._listening.socket, pages), name="http", daemon=True).start()

    def _metrics(self) -> Page:
        answered: Future[dict[str, Counts]] = Future()
        self._loop.add_callback_threadsafe(
            lambda: self._ask("counts", {}, lambda answer: answered.set_result(answer["queues"]))
        )
        try:
            counts = answered.result(_PATIENCE)
        except TimeoutError:
            return json_page(503, {"error": "the supervisor does not answer"})
        text = self._exposition.page(counts, self._health.snapshot, ready=self._health.ready()[0])
        return Page(200, CONTENT_TYPE_LATEST, text)
