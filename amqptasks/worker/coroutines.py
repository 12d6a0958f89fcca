"""An event loop that runs tasks; plain functions run on threads beside it."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from amqptasks.events import Bus
from amqptasks.execution.job import Job
from amqptasks.execution.runner import Runner
from amqptasks.outcome import Outcome
from amqptasks.task import Task
from amqptasks.worker.crew import Crew
from amqptasks.worker.outbox import Outbox
from amqptasks.worker.stalls import StallWatch
from amqptasks.worker.wire import FrameReader, report_of, returned, terminated, unpack_order

_new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with suppress(ImportError):
    from uvloop import new_event_loop as _new_loop

__all__ = ["AsyncCrew", "run_loop"]

_READ = 1 << 18


class AsyncCrew:
    """Runs async functions as asyncio tasks of one loop, and hands all other jobs to threads."""

    def __init__(
        self, runner: Runner, tasks: Mapping[str, Task[..., Any]], crew: Crew, outbox: Outbox, bus: Bus
    ) -> None:
        self._runner = runner
        self._tasks = tasks
        self._crew = crew
        self._outbox = outbox
        self._running: dict[int, tuple[Job, asyncio.Task[tuple[Outcome, float]]]] = {}
        self._stalls = StallWatch(lambda: list(self._running.values()), tasks, bus.flush)
        self._async_names: dict[str, bool] = {}
        self._flush_planned = False

    def put(self, lease: float, jobs: list[Job]) -> None:
        """Start jobs, if their lease has not ended."""
        loop = asyncio.get_running_loop()
        for job in jobs:
            if not self._is_async(job):
                self._crew.put(lease, [job])
                continue
            slot = self._outbox.begin(job.tag, time.monotonic())
            # Marked first, then looked: the leader takes back what is not marked when the lease has ended.
            if time.monotonic() > lease:
                self._add(returned(job.tag), slot)
            else:
                task = loop.create_task(self._runner.run_async(job))
                self._running[job.tag] = (job, task)
                task.add_done_callback(partial(self._done, job.tag, slot))
        if self._running:
            self._stalls.busy()

    def end(self, tag: int) -> None:
        """End a task."""
        running = self._running.get(tag)
        if running is not None:
            running[1].cancel()
        else:
            self._crew.end(tag)

    def _is_async(self, job: Job) -> bool:
        name = str(job.headers.get("task"))
        known = self._async_names.get(name)
        if known is None:
            task = self._tasks.get(name)
            known = self._async_names[name] = task is not None and inspect.iscoroutinefunction(task.function)
        return known

    def _done(self, tag: int, slot: int, task: asyncio.Task[tuple[Outcome, float]]) -> None:
        del self._running[tag]
        if task.cancelled():
            self._add(terminated(tag), slot)
        else:
            outcome, runtime = task.result()
            self._add(report_of(tag, outcome, runtime), slot)

    def _add(self, report: tuple[Any, ...], slot: int) -> None:
        self._outbox.add(report, slot)
        if not self._flush_planned:
            # Once a turn of the loop: a batch of outcomes is one write.
            self._flush_planned = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        self._outbox.flush()


def run_loop(channel: socket.socket, crew: AsyncCrew) -> None:
    """The main thread of an executor: an event loop that reads jobs until the leader closes the socket."""

    async def read() -> None:
        loop = asyncio.get_running_loop()
        closed = loop.create_future()
        loop.add_reader(channel, partial(_read, channel, FrameReader(), crew, partial(_set, closed)))
        await closed
        loop.remove_reader(channel)

    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(read())


def _read(channel: socket.socket, frames: FrameReader, crew: AsyncCrew, close: Callable[[], None]) -> None:
    try:
        # The socket blocks, for the reports that are written to it; this read does not: there is something to read.
        data = channel.recv(_READ)
    except OSError:
        data = b""
    if not data:
        close()
        return
    for frame in frames.feed(data):
        lease, jobs, condemned = unpack_order(frame)
        if condemned is not None:
            crew.end(condemned)
        else:
            crew.put(lease, jobs)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
