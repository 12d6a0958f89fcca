"""The executor: a process that runs tasks, and knows nothing of AMQP.

It reads batches of jobs from its socket, runs them, and writes outcomes back in batches. It has no connection to the
broker as a worker; a task that publishes opens the application's publisher like any other program.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from amqptasks.app import AmqpTasks
from amqptasks.events import Bus, ExecutorStarted, ExecutorStopping
from amqptasks.execution.bodies import Bodies
from amqptasks.execution.followups import FollowUps
from amqptasks.execution.interrupts import Interrupts, ThreadInterrupts, alarm
from amqptasks.execution.reports import Reporter
from amqptasks.execution.runner import Runner, SoftLimit
from amqptasks.message import Envelope
from amqptasks.protocol.events import custom_event
from amqptasks.request import Request
from amqptasks.worker.cell import Cell
from amqptasks.worker.coroutines import AsyncCrew, run_loop
from amqptasks.worker.crew import Crew, run_crew
from amqptasks.worker.event_switch import EventSwitch
from amqptasks.worker.greenlets import GreenletInterrupts
from amqptasks.worker.outbox import Outbox
from amqptasks.worker.process import set_title
from amqptasks.worker.wire import FrameReader, Report, pack_reports, report_of, returned, state_of, unpack_jobs

__all__ = ["REPORT_SIGNAL", "ExecutorSetup", "run_executor"]

_READ = 1 << 18
#: Outcomes are sent when so many are there, or so many seconds passed, or the batch is done. What is not sent when a
#: later task of the batch kills the process runs again, so the time is short.
_FLUSH_COUNT = 64
_FLUSH_SECONDS = 0.005
#: From the leader: say what has ended, the task that runs now takes long.
REPORT_SIGNAL = signal.SIGRTMIN + 3


@dataclass(frozen=True, slots=True)
class ExecutorSetup:
    """What an executor inherits over the fork."""

    app: AmqpTasks
    bus: Bus
    queue: str
    hostname: str
    pool: str
    concurrency: int
    events: EventSwitch


def run_executor(setup: ExecutorSetup, channel: socket.socket, cell: Cell) -> int:
    """The life of one executor. Returns its exit code, when the leader closed the socket."""
    set_title(f"amqptasks:{setup.queue}")
    setup.bus.emit(ExecutorStarted(setup.queue))
    try:
        if setup.pool in ("process", "solo"):
            _one_at_a_time(setup, channel, cell)
        else:
            _many_at_once(setup, channel, cell)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the leader is gone: the broker gives the work to others
    finally:
        setup.bus.emit(ExecutorStopping(setup.queue))
    return 0


def _runner(
    setup: ExecutorSetup,
    soft_limit: SoftLimit,
    send_state: Callable[[int, Envelope], None],
    ran: Callable[[], None] = lambda: None,
    again: Callable[[int], None] = lambda _tag: None,
) -> Runner:
    app = setup.app
    settings = app.settings
    reporter = Reporter(replies=settings.result.backend.startswith("rpc://"), store=app.result_store)

    def send_event(request: Request, kind: str, fields: Mapping[str, Any]) -> None:
        clock = setup.events.tick()
        send_state(0, custom_event(kind, setup.hostname, os.getpid(), clock, request.id, fields))

    Request.on_event = staticmethod(send_event)
    return Runner(
        app.tasks,
        settings,
        queue=setup.queue,
        hostname=setup.hostname,
        bus=setup.bus,
        bodies=Bodies(settings, app.calls.keys, app.calls.claims),
        soft_limit=soft_limit,
        reporter=reporter,
        follow=FollowUps(app.calls, app.tasks.get, reporter, settings.topology.prefix),
        send_state=send_state,
        ran=ran,
        again=again,
        coroutines=setup.pool != "gevent",
        describe=lambda: setup.events.on,
    )


def _die_when_condemned(cell: Cell) -> None:
    """A signal for the process group is the supervisor's to act on; one for the task that runs ends it."""

    def act(signum: int, frame: FrameType | None) -> None:
        if cell.condemned:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, act)


class _Reports:
    """What an executor of one task at a time has to report; sent in batches.

    A task that takes long keeps what ended before it from being sent. Then the leader asks for it, by a signal, which
    is acted on wherever the task runs Python, or waits.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._writing = False
        self.waiting: list[Report] = []
        #: Whether a task runs, so that nobody else changes `waiting`.
        self.running = False
        signal.signal(REPORT_SIGNAL, self._asked)
        signal.siginterrupt(REPORT_SIGNAL, False)

    def _asked(self, signum: int, frame: FrameType | None) -> None:
        if self.running and self.waiting and not self._writing:
            # Half a frame would be the end: no soft limit is raised meanwhile.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM,))
            try:
                self.send()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def send(self) -> None:
        """Send what waits."""
        reports, self.waiting = self.waiting, []
        self.write(reports)

    def write(self, reports: list[Report]) -> None:
        """Send these now."""
        self._writing = True
        try:
            self._channel.sendall(pack_reports(reports))
        finally:
            self._writing = False


def _one_at_a_time(setup: ExecutorSetup, channel: socket.socket, cell: Cell) -> None:
    reports = _Reports(channel)
    _die_when_condemned(cell)
    monotonic = time.monotonic
    runner = _runner(
        setup,
        alarm,
        lambda tag, message: reports.write([state_of(tag, message)]),
        cell.end,
        lambda tag: cell.begin(tag, monotonic()),
    )
    bus = setup.bus
    frames = FrameReader()
    while data := channel.recv(_READ):
        for frame in frames.feed(data):
            lease, jobs = unpack_jobs(frame)
            flushed = monotonic()
            for job in jobs:
                now = monotonic()
                if now > lease:
                    # A task before this one took long: the leader gives the rest to an executor that is free.
                    reports.waiting.append(returned(job.tag))
                    continue
                if reports.waiting and (len(reports.waiting) >= _FLUSH_COUNT or now - flushed > _FLUSH_SECONDS):
                    reports.send()
                    flushed = now = monotonic()
                cell.begin(job.tag, now)
                # Marked first, then looked: the leader takes back what is not marked when the lease has ended, and this
                # process, or the leader that it writes to, may have stood still meanwhile.
                if monotonic() > lease:
                    cell.end()
                    reports.waiting.append(returned(job.tag))
                    continue
                reports.running = True
                outcome, runtime = runner.run(job)
                reports.running = False
                reports.waiting.append(report_of(job.tag, outcome, runtime))
            cell.end()
            bus.flush()
            reports.send()


def _many_at_once(setup: ExecutorSetup, channel: socket.socket, cell: Cell) -> None:
    outbox = Outbox(channel, cell, setup.bus)

    def send_state(tag: int, message: Envelope) -> None:
        outbox.add(state_of(tag, message))
        outbox.flush()

    if setup.pool == "gevent":
        interrupts: Interrupts = GreenletInterrupts(importlib.import_module("gevent"))
    else:
        interrupts = ThreadInterrupts()
    runner = _runner(setup, interrupts.soft_limit, send_state)
    crew = Crew(runner, interrupts, outbox)
    if setup.pool == "asyncio":
        run_loop(channel, AsyncCrew(runner, setup.app.tasks, crew, outbox, setup.bus))
    else:
        run_crew(channel, crew)
