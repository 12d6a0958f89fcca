"""Where coroutines run, those of tasks and of errbacks; and what must not run on an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from amqptasks.execution.interrupts import endable
from amqptasks.execution.reports import running_loop

__all__ = ["Coroutines", "beside"]

T = TypeVar("T")
_log = structlog.get_logger("amqptasks.worker")


class Coroutines:
    """Runs coroutines for one executor. `allowed`: whether they can run in its pool at all."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._loops = threading.local()
        #: Errbacks to call that an asyncio pool came upon on its loop, which they may hold up: `finish` does it.
        self.planned: list[Callable[[], None]] = []
        #: The event loop of an asyncio pool; None in others.
        self.loop: asyncio.AbstractEventLoop | None = None

    def run(self, value: Coroutine[Any, Any, Any], limit: float | None = None) -> Any:
        """Run it to its end on this thread's loop, which lives as long as the thread: clients that tasks keep stay
        usable."""
        if not self._allowed:
            value.close()
            raise TypeError("an async task cannot run in a gevent pool: use asyncio, thread or process for its queue")
        runner: asyncio.Runner | None = getattr(self._loops, "runner", None)
        if runner is None:
            runner = self._loops.runner = asyncio.Runner()
            weakref.finalize(self, runner.close)
        # A context of its own: the runner's would carry one task's variables, and its request, into the next task.
        return runner.run(endable(value, limit), context=contextvars.copy_context())

    def call_errback(self, call: Callable[[], None]) -> None:
        """Call an errback, in `finish` where this is the loop of an asyncio pool."""
        if self.loop is not None and self.loop is running_loop():
            self.planned.append(call)
        else:
            call()

    def run_errback(self, value: Coroutine[Any, Any, Any]) -> None:
        """Run what an async errback gave to its end; in an asyncio pool on its loop."""
        if self.loop is None:
            self.run(value)
        else:
            asyncio.run_coroutine_threadsafe(value, self.loop).result()

    async def finish(self) -> None:
        """Call the errbacks that were planned since the last await, on a thread: only then has their task ended."""
        planned, self.planned = self.planned, []
        for one in planned:
            try:
                await asyncio.to_thread(one)
            except asyncio.CancelledError:
                raise
            except BaseException:  # `SystemExit`, say
                _log.exception("An errback raised")


async def beside(blocks: bool, function: Callable[..., T], *args: Any) -> T:
    """Call it on a thread where it may wait for a server; else here."""
    return await asyncio.to_thread(function, *args) if blocks else function(*args)
