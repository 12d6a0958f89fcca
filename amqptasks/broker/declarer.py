"""Declaring the topology for a publisher, when something of it turns out to be missing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from amqptasks.errors import AmqpTasksError, BrokerError

__all__ = ["DELETED_PAUSE", "TopologyDeclarer"]

logger = logging.getLogger(__name__)
_DECLARE_PAUSE = 5.0
#: Seconds between finding that a queue is missing and declaring it. It may have been deleted a moment ago, and a quorum
#: queue tells its consumers 30 ms later: one that is there again by then tells them nothing, and gives them nothing
#: (RabbitMQ 3.10.8). The worker would notice after ten seconds and more.
DELETED_PAUSE = 0.25


class TopologyDeclarer:
    """Declares the topology beside the I/O thread: a slow declaration must not hold up confirms and heartbeats."""

    def __init__(
        self,
        loop: Any,
        declare: Callable[[], None] | None,
        knows_route: Callable[[str, str | None], bool] | None,
    ) -> None:
        self._loop = loop
        self._declare = declare
        self._knows_route = knows_route
        self._declared_at: float | None = None

    def knows(self, exchange: str, routing_key: str | None) -> bool:
        """Whether exchange and routing key (None for any) belong to the topology."""
        knows_route = self._knows_route
        return self._declare is not None and knows_route is not None and knows_route(exchange, routing_key)

    def declare(self, then: Callable[[AmqpTasksError | None], None], *, pause: float) -> None:
        """Declare after `pause` seconds, at most every 5 s, and call `then` on the loop's thread."""
        if self._declared_at is not None and time.monotonic() - self._declared_at < _DECLARE_PAUSE:
            self._loop.call_later(0, lambda: then(None))
        else:
            threading.Thread(target=self._run, args=(then, pause), name="amqptasks-declare", daemon=True).start()

    def _run(self, then: Callable[[AmqpTasksError | None], None], pause: float) -> None:
        time.sleep(pause)
        problem: AmqpTasksError | None = None
        try:
            assert self._declare is not None
            self._declare()
            self._declared_at = time.monotonic()
        except AmqpTasksError as error:
            problem = error
        except Exception as error:
            logger.exception("The topology could not be declared")
            problem = BrokerError(f"the topology could not be declared: {error!r}")
        self._loop.add_callback_threadsafe(lambda: then(problem))
