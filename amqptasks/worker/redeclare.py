"""A queue vanished: the topology is declared again, in a process of its own, so that no signal waits for the broker."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.broker.counts import queue_counts
from amqptasks.broker.declarer import DELETED_PAUSE
from amqptasks.errors import AccessRefused, AmqpTasksError
from amqptasks.topology.plan import parking_queue
from amqptasks.worker.process import fork_child

__all__ = ["Redeclaring"]

_PAUSE = 1.0
_log = structlog.get_logger("amqptasks.worker")


class Redeclaring:
    """One process at a time, and one a second. Belongs to the supervisor.

    Args:
        keep: descriptors that belong to the application.
    """

    def __init__(self, app: AmqpTasks, keep: frozenset[int]) -> None:
        self._app = app
        self._keep = keep
        self._pid = 0
        self._began = 0.0
        #: Whether a queue was replaced since the process began.
        self._again = False

    def begin(self, *, replaced: bool) -> None:
        """Declare, unless that was begun just now.

        Who misses something says so until it is there. That a queue was `replaced` is said once: its consumer was
        cancelled, and consumes again, perhaps another queue of that name, to which nothing leads.
        """
        if self._pid:
            self._again = self._again or replaced
        elif replaced:
            self._start(self._bind)
        elif time.monotonic() - self._began >= _PAUSE:
            self._start(self._declare)

    def reaped(self, pid: int) -> None:
        """A process has ended."""
        if pid == self._pid:
            self._pid = 0
            if self._again:
                self._again = False
                self._start(self._bind)

    def _start(self, work: Callable[[], int]) -> None:
        self._began = time.monotonic()
        self._pid = fork_child(work, keep=self._keep)

    def _bind(self) -> int:
        """Declare, unless a queue is being migrated: that binds when its time has come, and not before."""
        settings = self._app.settings
        try:
            parked = queue_counts(
                settings.broker, (parking_queue(settings.topology.prefix, name) for name in settings.queues)
            )
        except AccessRefused:
            return 0  # who may not look at queues does not make them
        except AmqpTasksError as error:
            _log.error("Cannot declare the topology", error=str(error))
            return 1
        return 0 if any(count is not None for count in parked.values()) else self._declare()

    def _declare(self) -> int:
        time.sleep(DELETED_PAUSE)
        try:
            self._app.declare()
        except AmqpTasksError as error:
            _log.error("Cannot declare the topology", error=str(error))
            return 1
        _log.info("Declared the topology again")
        return 0
