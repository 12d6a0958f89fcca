"""Who holds up an event loop: a call that blocks in an ``async def`` task stops every other task of its executor.

While tasks run, the loop notes every quarter of a second that it turns, and a thread looks whether it does. Nothing is
done for a single task.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import structlog

from amqptasks.execution.job import Job
from amqptasks.task import Task

__all__ = ["StallWatch"]

_LOOK_SECONDS = 0.25
#: A loop that has not turned for so long is held up. Shorter pauses are a busy machine's, too.
_STALL_SECONDS = 1.0
_ADVICE = (
    "every task of this executor waits for it; use a library for asyncio, asyncio.to_thread(…), or a plain `def`, "
    "which runs on a thread"
)

_log = structlog.get_logger("amqptasks.worker")


class StallWatch:
    """Watches one loop. `busy` belongs to the loop.

    Args:
        running: the jobs that have begun and not ended, each with its asyncio task.
        tasks: by name.
        flush: writes what is logged: the process may be killed for its task's time limit.
    """

    def __init__(
        self,
        running: Callable[[], Iterable[tuple[Job, asyncio.Task[Any]]]],
        tasks: Mapping[str, Task[..., Any]],
        flush: Callable[[], None],
    ) -> None:
        self._running = running
        self._tasks = tasks
        self._flush = flush
        self._loop_thread = threading.get_ident()
        self._turned = 0.0
        self._ticking = threading.Event()
        self._started = False

    def busy(self) -> None:
        """Tasks begin: watch, until none runs any more."""
        if self._ticking.is_set():
            return
        self._turned = time.monotonic()
        self._ticking.set()
        if not self._started:
            self._started = True
            threading.Thread(target=self._watch, name="amqptasks-stalls", daemon=True).start()
        asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._turned = time.monotonic()
        if any(True for _ in self._running()):
            asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._tick)
        else:
            self._ticking.clear()

    def _watch(self) -> None:
        suspect = reported = 0.0
        name: str | None = None
        while True:
            self._ticking.wait()
            time.sleep(_LOOK_SECONDS)
            turned = self._turned
            if reported and turned != reported:
                _log.warning("The event loop goes on", task=name, seconds=round(turned - reported, 1))
                reported = 0.0
            if not self._ticking.is_set() or time.monotonic() - turned < _STALL_SECONDS or turned == reported:
                continue
            # Seen twice: where something else held the interpreter, the loop turns as soon as this thread runs, too.
            if turned == suspect:
                reported, name = turned, self._report(time.monotonic() - turned)
            suspect = turned

    def _report(self, seconds: float) -> str | None:
        """Log who it is. Returns the task's name; None when it is an asyncio task that a task has started."""
        job = next((job for job, task in self._running() if _is_running(task)), None)
        headers: Mapping[str, Any] = {} if job is None else job.headers
        name = headers.get("task")
        frame = sys._current_frames().get(self._loop_thread)
        task = self._tasks.get(str(name))
        _log.warning(
            "A blocking call holds up the event loop",
            task=name,
            task_id=headers.get("id"),
            seconds=round(seconds, 1),
            at=_shown(frame),
            called_at=None if task is None else _shown(_frame_of(frame, task.function)),
            advice=_ADVICE,
        )
        self._flush()
        return name


def _is_running(task: asyncio.Task[Any]) -> bool:
    """Whether it is this one that has the loop; all others wait."""
    return bool(getattr(task.get_coro(), "cr_running", False))


def _frame_of(frame: FrameType | None, function: Callable[..., Any]) -> FrameType | None:
    """The innermost frame of the file in which the function stands."""
    code = getattr(function, "__code__", None)
    while frame is not None and code is not None and frame.f_code.co_filename != code.co_filename:
        frame = frame.f_back
    return frame


def _shown(frame: FrameType | None) -> str | None:
    return None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
