"""Waiting for one result: on a thread, and on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from amqptasks.protocol.results import ResultMeta
from amqptasks.results.access import Listener
from amqptasks.results.raising import late

__all__ = ["wait_async", "wait_blocking"]

Listen = Callable[[Listener], Callable[[], None]]


def wait_blocking(task_id: str, listen: Listen, gone: Callable[[], bool], timeout: float | None) -> None:
    """Return when the result is ready, or cannot come. Raises `ResultTimeout`, and what `listen` raises."""
    ready = threading.Event()

    def told(meta: ResultMeta) -> None:
        if meta.ready or gone():
            ready.set()

    stop = listen(told)
    try:
        if not ready.wait(timeout):
            raise late([task_id], timeout)
    finally:
        stop()


async def wait_async(
    task_id: str,
    listen: Listen,
    look: Callable[[], ResultMeta],
    gone: Callable[[], bool],
    timeout: float | None,  # noqa: ASYNC109 - it is `aget`'s
) -> ResultMeta:
    """The result when it is ready, without blocking the loop. Raises `ResultTimeout`, and what the others raise.

    `timeout` is for all of it: a store that is away is asked on a thread, which may take longer.
    """
    if timeout is not None and timeout <= 0:
        found = await asyncio.to_thread(look)
        if not found.ready:
            raise late([task_id], timeout)
        return found
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def heard() -> None:
        if not ready.done():
            ready.set_result(None)

    def told(meta: ResultMeta) -> None:
        if meta.ready or gone():
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(heard)

    listening = _Listening(listen, told)
    try:
        async with asyncio.timeout(timeout):
            await asyncio.to_thread(listening.begin)
            await ready
            return await asyncio.to_thread(look)
    except TimeoutError:
        raise late([task_id], timeout) from None
    finally:
        listening.end()


class _Listening:
    """A listener that begins on one thread and ends on another. It may end first: who waited was cancelled."""

    def __init__(self, listen: Listen, told: Listener) -> None:
        self._listen = listen
        self._told = told
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None
        self._ended = False

    def begin(self) -> None:
        stop = self._listen(self._told)
        with self._lock:
            if not self._ended:
                self._stop = stop
                return
        stop()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            stop, self._stop = self._stop, None
        if stop is not None:
            stop()
