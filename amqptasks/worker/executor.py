"""The executor: a process that runs tasks, and knows nothing of AMQP.

It reads batches of jobs from its socket, runs them, and writes outcomes back in batches. It has no connection to the
broker as a worker; a task that publishes opens the application's publisher like any other program.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from amqptasks.app import AmqpTasks
from amqptasks.errors import SoftTimeLimitExceeded
from amqptasks.events import Bus, ExecutorStarted, ExecutorStopping
from amqptasks.execution.followups import FollowUps
from amqptasks.execution.job import Job
from amqptasks.execution.reports import Reporter
from amqptasks.execution.runner import Runner
from amqptasks.message import Envelope
from amqptasks.worker.cell import Cell
from amqptasks.worker.process import set_title
from amqptasks.worker.wire import FrameReader, Report, pack_reports, report_of, returned, state_of, unpack_jobs

__all__ = ["ExecutorSetup", "run_executor"]

_READ = 1 << 18
#: Outcomes are sent when so many are there, or so many seconds passed, or the batch is done. What is not sent when a
#: later task of the batch kills the process runs again, so the time is short.
_FLUSH_COUNT = 64
_FLUSH_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class ExecutorSetup:
    """What an executor inherits over the fork."""

    app: AmqpTasks
    bus: Bus
    queue: str
    hostname: str
    pool: str
    concurrency: int


#: A year. The system's timers end with its clock's type.
_LONGEST_ALARM = 365 * 86400.0


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
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


def run_executor(setup: ExecutorSetup, channel: socket.socket, cell: Cell) -> int:
    """The life of one executor. Returns its exit code, when the leader closed the socket."""
    set_title(f"amqptasks:{setup.queue}")
    setup.bus.emit(ExecutorStarted(setup.queue))
    try:
        if setup.pool == "asyncio":
            asyncio.run(_AsyncLoop(setup, channel).run())
        else:
            _one_at_a_time(setup, channel, cell)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the leader is gone: the broker gives the work to others
    finally:
        setup.bus.emit(ExecutorStopping(setup.queue))
    return 0


def _runner(setup: ExecutorSetup, send_state: Callable[[int, Envelope], None], ran: Callable[[], None]) -> Runner:
    app = setup.app
    settings = app.settings
    reporter = Reporter(replies=settings.result.backend.startswith("rpc://"), store=app.result_store)
    return Runner(
        app.tasks,
        settings,
        queue=setup.queue,
        hostname=setup.hostname,
        bus=setup.bus,
        soft_limit=_alarm,
        reporter=reporter,
        follow=FollowUps(app.calls, app.tasks.get, reporter, settings.topology.prefix),
        send_state=send_state,
        ran=ran,
    )


def _one_at_a_time(setup: ExecutorSetup, channel: socket.socket, cell: Cell) -> None:
    def send_state(tag: int, message: Envelope) -> None:
        channel.sendall(pack_reports([state_of(tag, message)]))

    runner, bus = _runner(setup, send_state, cell.end), setup.bus
    frames = FrameReader()
    monotonic = time.monotonic
    while data := channel.recv(_READ):
        for frame in frames.feed(data):
            lease, jobs = unpack_jobs(frame)
            reports: list[Report] = []
            flushed = monotonic()
            for job in jobs:
                now = monotonic()
                if now > lease:
                    # A task before this one took long: the leader gives the rest to an executor that is free.
                    reports.append(returned(job.tag))
                    continue
                if reports and (len(reports) >= _FLUSH_COUNT or now - flushed > _FLUSH_SECONDS):
                    channel.sendall(pack_reports(reports))
                    reports, flushed = [], now
                cell.begin(job.tag, now)
                outcome, runtime = runner.run(job)
                reports.append(report_of(job.tag, outcome, runtime))
            cell.end()
            bus.flush()
            channel.sendall(pack_reports(reports))


class _AsyncLoop:
    """Runs jobs as asyncio tasks on one loop, and sends their outcomes once a turn of the loop."""

    def __init__(self, setup: ExecutorSetup, channel: socket.socket) -> None:
        self._runner = _runner(setup, self._send_state, lambda: None)
        self._channel = channel
        self._bus = setup.bus
        self._reports: list[Report] = []
        self._running: set[asyncio.Task[None]] = set()
        self._done = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._channel.setblocking(False)
        frames = FrameReader()
        while data := await loop.sock_recv(self._channel, _READ):
            for frame in frames.feed(data):
                _, jobs = unpack_jobs(frame)
                for job in jobs:
                    task = loop.create_task(self._one(job))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)

    async def _one(self, job: Job) -> None:
        outcome, runtime = await self._runner.run_async(job)
        self._report(report_of(job.tag, outcome, runtime))

    def _report(self, report: Report) -> None:
        if not self._reports:
            self._loop.call_soon(self._flush)
        self._reports.append(report)

    def _send_state(self, tag: int, message: Envelope) -> None:
        # From any thread: plain functions run beside the loop.
        self._loop.call_soon_threadsafe(self._report, state_of(tag, message))

    def _flush(self) -> None:
        reports, self._reports = self._reports, []
        self._bus.flush()
        self._channel.setblocking(True)
        try:
            # Blocks only when the leader has stopped reading, and then nothing better can be done.
            self._channel.sendall(pack_reports(reports))
        except OSError:
            os._exit(0)
        finally:
            self._channel.setblocking(False)
