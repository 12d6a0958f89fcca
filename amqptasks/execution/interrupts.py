"""Exceptions raised in a running task from outside: soft time limits, and the request to end."""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import signal
import threading
import time
import types
from collections.abc import Coroutine, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any, Protocol

from amqptasks.errors import SoftTimeLimitExceeded

__all__ = ["Interrupts", "Terminated", "ThreadInterrupts", "alarm", "endable", "limited"]

#: A year. The system's timers end with its clock's type.
_LONGEST_ALARM = 365 * 86400.0
_SPARE_GUARDS = 64


class Terminated(BaseException):
    """Raised inside a task that is to end: revoked, or at its hard time limit. No `Exception`, so that a task which
    handles its errors does not handle this."""


class Interrupts(Protocol):
    """How a pool raises exceptions in its tasks."""

    def soft_limit(self, seconds: float) -> AbstractContextManager[None]:
        """Raise `SoftTimeLimitExceeded` inside the block after so many seconds."""

    def me(self) -> Any:
        """What names the calling thread, or greenlet, to the others."""

    def end(self, who: Any) -> None:
        """Raise `Terminated` in it, as soon as it can be."""

    def calm(self, who: Any) -> None:
        """Take back what was raised in it and has not arrived."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `SoftTimeLimitExceeded` in the block after `seconds` (SIGALRM, so on the main thread)."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SoftTimeLimitExceeded(f"{seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, _LONGEST_ALARM))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# -- threads ----------------------------------------------------------------------------------------------------------


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Raise it in a thread the next time it runs Python code; None takes back what has not been raised yet.

    PyThreadState_SetAsyncExc of Python's C API: a thread that is inside a C call gets it afterwards.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(exception) if exception is not None else None
    )


class ThreadInterrupts:
    """Interrupts for threads. Soft limits are kept by one thread of its own, which starts with the first."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._guards: list[_Guard] = []
        self._active = 0
        self._watching = False

    def soft_limit(self, seconds: float) -> AbstractContextManager[None]:
        """See `Interrupts`."""
        return _Guard(self, seconds)

    def me(self) -> int:
        """The calling thread."""
        return threading.get_ident()

    def end(self, who: int) -> None:
        """See `Interrupts`."""
        running = _coroutines.get(who)
        if running is None:
            _raise_in(who, Terminated)
        else:
            # It may wait in its loop's select, where no exception arrives.
            loop, task = running
            loop.call_soon_threadsafe(task.cancel)

    def calm(self, who: int) -> None:
        """See `Interrupts`."""
        _raise_in(who, None)

    def _add(self, guard: _Guard) -> None:
        with self._changed:
            heapq.heappush(self._guards, guard)
            self._active += 1
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="amqptasks-limits", daemon=True).start()
            elif self._guards[0] is guard:
                self._changed.notify()

    def _remove(self, guard: _Guard) -> None:
        with self._changed:
            guard.over = True
            self._active -= 1
            if len(self._guards) > _SPARE_GUARDS + 2 * self._active:
                self._guards = [one for one in self._guards if not one.over]
                heapq.heapify(self._guards)

    def _watch(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                while self._guards and (self._guards[0].over or self._guards[0].due <= now):
                    guard = heapq.heappop(self._guards)
                    if not guard.over:
                        guard.fired = True
                        _raise_in(guard.thread, SoftTimeLimitExceeded)
                self._changed.wait(min(self._guards[0].due - now, _LONGEST_ALARM) if self._guards else None)


class _Guard(AbstractContextManager[None]):
    """One block under a soft limit."""

    def __init__(self, owner: ThreadInterrupts, seconds: float) -> None:
        self._owner = owner
        self._seconds = seconds
        self.thread = threading.get_ident()
        self.due = time.monotonic() + seconds
        self.over = self.fired = False

    def __lt__(self, other: _Guard) -> bool:
        return self.due < other.due

    def __enter__(self) -> None:
        self._owner._add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner._remove(self)
        if self.fired:
            _raise_in(self.thread, None)
            if isinstance(error, SoftTimeLimitExceeded) and not error.args:
                error.args = (f"{self._seconds:g} s",)


# -- coroutines -------------------------------------------------------------------------------------------------------


#: By thread: the coroutine that it runs on a loop of its own.
_coroutines: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = {}


async def endable(coroutine: Coroutine[Any, Any, Any], seconds: float | None) -> Any:
    """Await a coroutine on a loop of this thread's own, under a soft limit. Raises `Terminated` when it is ended."""
    task, thread = asyncio.current_task(), threading.get_ident()
    assert task is not None
    _coroutines[thread] = task.get_loop(), task
    try:
        return await (coroutine if seconds is None else limited(coroutine, seconds))
    except asyncio.CancelledError:
        if task.cancelling():
            raise Terminated from None
        raise
    finally:
        del _coroutines[thread]


async def limited(coroutine: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """Await a coroutine; after so many seconds, `SoftTimeLimitExceeded` is raised where it waits."""
    task = asyncio.current_task()
    assert task is not None
    limit = _Limit(task, seconds)
    timer = task.get_loop().call_later(seconds, limit.pass_over)
    try:
        return await _translated(coroutine, limit)
    finally:
        timer.cancel()


class _Limit:
    """Turns the cancellation with which the loop interrupts a task into the exception of the time limit."""

    def __init__(self, task: asyncio.Task[Any], seconds: float) -> None:
        self._task = task
        self._seconds = seconds
        self._passed = False

    def pass_over(self) -> None:
        self._passed = True
        self._task.cancel()

    def translate(self, error: BaseException) -> BaseException:
        if self._passed and isinstance(error, asyncio.CancelledError):
            self._passed = False
            # Nobody has cancelled the task: what it awaits while it cleans up is not to be cancelled either.
            self._task.uncancel()
            return SoftTimeLimitExceeded(f"{self._seconds:g} s")
        return error


@types.coroutine
def _translated(coroutine: Coroutine[Any, Any, Any], limit: _Limit) -> Generator[Any, Any, Any]:
    """Runs a coroutine as ``await`` does, and translates what the loop throws into it."""
    thrown: BaseException | None = None
    while True:
        try:
            awaited = coroutine.send(None) if thrown is None else coroutine.throw(thrown)
        except StopIteration as end:
            return end.value
        try:
            yield awaited
            thrown = None
        except BaseException as error:  # whatever it is, it is the coroutine's
            thrown = limit.translate(error)
