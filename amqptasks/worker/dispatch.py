"""Dispatch: waiting deliveries go to executors with room, in batches; executors that die are replaced.

An idle executor takes the next task, whoever is busy. How many jobs an executor holds at a time (its *credit*) follows
the measured run time: one for long tasks, dozens for tasks of microseconds. A batch is a lease: what an executor has
not started when the lease ends, it returns, and the leader gives it to another.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import structlog

from amqptasks.message import Envelope
from amqptasks.outcome import Failed, Lost, Outcome, Reason
from amqptasks.worker.cell import Cell
from amqptasks.worker.delivery import Delivery, Stage
from amqptasks.worker.executor import ExecutorSetup, run_executor
from amqptasks.worker.handle import ExecutorHandle, describe_exit
from amqptasks.worker.process import fork_child
from amqptasks.worker.wire import STATE, Report, envelopes, pack_jobs, unpack_report, unpack_reports

__all__ = ["Dispatcher", "Loop"]

#: Seconds for which an executor may start what it holds.
LEASE = 0.5
#: After lease and grace the leader takes back what was not started.
LEASE_GRACE = 0.25
_READ = 1 << 18
_MAX_CREDIT = 64
#: An executor should hold about so many seconds of work.
_WORK_IN_HAND = 0.02
_LONG_TASK = 0.1
_RESPAWN_FIRST, _RESPAWN_MAX = 0.1, 10.0

_log = structlog.get_logger("amqptasks.worker")


class Loop(Protocol):
    """The I/O loop, as dispatch uses it (pika's)."""

    READ: int
    WRITE: int

    def add_handler(self, fd: int, handler: Callable[[int, int], None], events: int) -> None:
        """Watch a descriptor."""

    def update_handler(self, fd: int, events: int) -> None:
        """Watch it for other events."""

    def remove_handler(self, fd: int) -> None:
        """Stop watching it."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        """Call back once."""


class Dispatcher:
    """The executors of one queue, and the deliveries that wait for them.

    Args:
        on_outcome: called with each delivery and the outcome that its executor reported.
        on_death: called with the delivery that ran in an executor that died, and what that means for it.
        hard_limit: seconds a delivery's task may run; None for no limit.
        on_state: called with a message that a running task sends.
    """

    def __init__(
        self,
        loop: Loop,
        setup: ExecutorSetup,
        processes: int,
        *,
        keep: frozenset[int],
        on_outcome: Callable[[Delivery, Outcome], None],
        on_death: Callable[[Delivery, Failed | Lost], None],
        hard_limit: Callable[[Delivery], float | None],
        on_state: Callable[[Envelope], None],
    ) -> None:
        self._loop = loop
        self._setup = setup
        self._processes = processes
        self._keep = keep
        self._on_outcome = on_outcome
        self._on_death = on_death
        self._hard_limit = hard_limit
        self._on_state = on_state
        self._concurrent = setup.pool == "asyncio"
        self._slots = max(1, setup.concurrency // processes) if self._concurrent else 1
        self.executors: list[ExecutorHandle] = []
        self.waiting: deque[Delivery] = deque()
        #: Mean run time in seconds, exponentially weighted; None before the first task.
        self.runtime: float | None = None
        self.finished = 0
        self._given_out = 0
        self._closing = False
        self._respawn_delay = 0.0
        self._limited = False

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Fork the executors."""
        for _ in range(self._processes):
            self._spawn()
        self._loop.call_later(0.1, self._tick)

    def abandon(self) -> list[Delivery]:
        """End the executors: those that run something at once, the idle ones in their own time.

        Returns what was held, to be given back.
        """
        self._closing = True
        held = self.held()
        for executor in self.executors:
            if executor.inflight:
                executor.inflight.clear()
                executor.signal(signal.SIGKILL)
            else:
                with suppress(OSError):
                    executor.socket.shutdown(socket.SHUT_WR)
        return held

    def held(self) -> list[Delivery]:
        """What the executors hold."""
        return [delivery for executor in self.executors for delivery in executor.inflight.values()]

    @property
    def busy(self) -> int:
        """How many deliveries the executors hold."""
        return sum(len(executor.inflight) for executor in self.executors)

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        cell = Cell()
        setup = self._setup
        pid = fork_child(lambda: run_executor(setup, theirs, cell), keep=self._keep | {theirs.fileno()})
        theirs.close()
        ours.setblocking(False)
        executor = ExecutorHandle(pid, ours, cell)
        self.executors.append(executor)
        self._loop.add_handler(ours.fileno(), lambda _fd, events: self._ready(executor, events), self._loop.READ)
        self._loop.add_handler(executor.pidfd, lambda _fd, _events: self._died(executor), self._loop.READ)

    # -- out ------------------------------------------------------------------------------------------------------

    def submit(self, delivery: Delivery) -> None:
        """Put a delivery at the end of the line. `pump` sends it."""
        self.waiting.append(delivery)

    def pump(self) -> None:
        """Give waiting deliveries to executors with room, least busy first, in even shares."""
        waiting = self.waiting
        if not waiting or not self.executors:
            return
        credit = self.credit
        able = [one for one in self.executors if len(one.inflight) < credit and not self._stuck(one)]
        able.sort(key=lambda one: len(one.inflight))
        for index, executor in enumerate(able):
            room = credit - len(executor.inflight)
            # Half of an executor's credit at least, so that a wake-up carries more than one job; and no more than its
            # share, so that none idles while another has a batch.
            if room * 2 < credit and len(waiting) > room:
                continue
            share = -(-len(waiting) // (len(able) - index))
            batch: list[Delivery] = []
            while waiting and len(batch) < min(room, share):
                delivery = waiting.popleft()
                if delivery.stage is Stage.WAITING:
                    batch.append(delivery)
            if batch:
                self._send(executor, batch)
            if not waiting:
                return

    def _stuck(self, executor: ExecutorHandle) -> bool:
        """Whether it runs a task that takes long, or is silent, so that nothing should wait behind it."""
        if executor.silent:
            return True
        return not self._concurrent and bool(executor.inflight) and executor.cell.read()[1] > _LONG_TASK

    @property
    def stalled(self) -> bool:
        """Whether every executor runs a task that takes long: what waits here should wait in the broker."""
        return bool(self.executors) and all(self._stuck(executor) for executor in self.executors)

    @property
    def free(self) -> bool:
        """Whether an executor would take a job now."""
        return any(len(one.inflight) < self.credit and not self._stuck(one) for one in self.executors)

    @property
    def credit(self) -> int:
        """How many deliveries one executor may hold."""
        if self._concurrent:
            return self._slots
        if self.runtime is None or self.runtime >= _LONG_TASK:
            return 1
        return max(2, min(_MAX_CREDIT, int(_WORK_IN_HAND / max(self.runtime, 1e-6))))

    def _send(self, executor: ExecutorHandle, batch: list[Delivery]) -> None:
        now = time.monotonic()
        jobs = []
        for delivery in batch:
            delivery.stage = Stage.RUNNING
            self._given_out += 1
            delivery.number = self._given_out
            executor.inflight[delivery.number] = delivery
            jobs.append(delivery.job())
            if not self._limited and self._hard_limit(delivery) is not None:
                self._limited = True
        executor.lease = now + LEASE
        frame = pack_jobs(jobs, executor.lease)
        if not executor.output:
            try:
                sent = executor.socket.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # it died: `_died` gives its deliveries back
            if sent == len(frame):
                return
            frame = frame[sent:]
        executor.output += frame
        self._loop.update_handler(executor.socket.fileno(), self._loop.READ | self._loop.WRITE)

    # -- in -------------------------------------------------------------------------------------------------------

    def _ready(self, executor: ExecutorHandle, events: int) -> None:
        if events & self._loop.WRITE and executor.output:
            self._write(executor)
        if events & ~self._loop.WRITE:
            self._read(executor)

    def _write(self, executor: ExecutorHandle) -> None:
        try:
            sent = executor.socket.send(executor.output)
        except BlockingIOError:
            return
        except OSError:
            executor.output.clear()
            return
        del executor.output[:sent]
        if not executor.output:
            self._loop.update_handler(executor.socket.fileno(), self._loop.READ)

    def _read(self, executor: ExecutorHandle) -> None:
        try:
            data = executor.socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # Its end of the socket is closed; the process descriptor says when it is gone.
            self._loop.remove_handler(executor.socket.fileno())
            return
        executor.silent = False
        for frame in executor.frames.feed(data):
            for report in unpack_reports(frame):
                self._report(executor, report)
        self.pump()

    def _report(self, executor: ExecutorHandle, report: Report) -> None:
        if report[1] == STATE:
            for message in envelopes(report[3]):
                self._on_state(message)
            return
        delivery = executor.inflight.pop(report[0], None)
        if delivery is None or delivery.stage is not Stage.RUNNING:
            return  # taken back when the lease had ended
        outcome = unpack_report(report)
        if outcome is None:
            delivery.stage = Stage.WAITING
            self.waiting.appendleft(delivery)
            return
        runtime = report[2]
        self.runtime = runtime if self.runtime is None else self.runtime + (runtime - self.runtime) / 16
        self.finished += 1
        self._respawn_delay = 0.0
        self._on_outcome(delivery, outcome)

    # -- limits, leases -------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._closing and not self.executors:
            return
        self._loop.call_later(0.1, self._tick)
        if self._concurrent:
            return
        now = time.monotonic()
        for executor in self.executors:
            if not executor.inflight:
                continue
            number, ran = executor.cell.read()
            if self._limited:
                self._enforce(executor, number, ran)
            if len(executor.inflight) > 1 and now > executor.lease + LEASE_GRACE:
                self._take_back(executor)

    def _enforce(self, executor: ExecutorHandle, number: int, ran: float) -> None:
        delivery = executor.inflight.get(number)
        limit = None if delivery is None else self._hard_limit(delivery)
        if limit is not None and ran > limit and executor.killed_for is None:
            executor.killed_for = Failed(
                Reason.TIME_LIMIT,
                "TimeLimitExceeded",
                f"the hard time limit of {limit:g} s passed; the task was killed",
            )
            _log.error(
                "Hard time limit exceeded: executor killed",
                queue=self._setup.queue,
                limit=limit,
                pid=executor.pid,
                task_id=delivery.headers.get("id") if delivery is not None else None,
            )
            executor.signal(signal.SIGKILL)

    def _take_back(self, executor: ExecutorHandle) -> None:
        """What an executor did not start before its lease ended goes to others; it returns it unstarted."""
        begun = executor.cell.begun()
        # What it has reported counts, though this process was stopped for a while and has not read it yet.
        self._read_rest(executor)
        held = list(executor.inflight)
        behind = held[held.index(begun) + 1 :] if begun in executor.inflight else held
        for number in reversed(behind):
            delivery = executor.inflight.pop(number)
            delivery.stage = Stage.WAITING
            self.waiting.appendleft(delivery)
        if behind:
            executor.silent = True
            self.pump()

    # -- death ----------------------------------------------------------------------------------------------------

    def _died(self, executor: ExecutorHandle) -> None:
        self._read_rest(executor)
        self._loop.remove_handler(executor.pidfd)
        with suppress(KeyError, ValueError):  # `_read` may have been there first
            self._loop.remove_handler(executor.socket.fileno())
        os.close(executor.pidfd)
        executor.socket.close()
        _, status = os.waitpid(executor.pid, 0)
        self.executors.remove(executor)
        how = describe_exit(status)
        running, _ = executor.cell.read()
        executor.cell.close()
        self._give_out_again(executor, running, how)
        if self._closing:
            return
        _log.error("Executor died", queue=self._setup.queue, pid=executor.pid, how=how)
        if time.monotonic() - executor.started < 1.0:
            # It dies as soon as it lives: do not spin.
            self._respawn_delay = min(max(_RESPAWN_FIRST, self._respawn_delay * 2), _RESPAWN_MAX)
        self._loop.call_later(self._respawn_delay, self._replace)
        self.pump()

    def _replace(self) -> None:
        if not self._closing and len(self.executors) < self._processes:
            self._spawn()
            self.pump()

    def _read_rest(self, executor: ExecutorHandle) -> None:
        """Outcomes that were sent before it died count."""
        try:
            while data := executor.socket.recv(_READ):
                for frame in executor.frames.feed(data):
                    for report in unpack_reports(frame):
                        self._report(executor, report)
        except OSError:
            return

    def _give_out_again(self, executor: ExecutorHandle, running: int, how: str) -> None:
        for delivery in reversed(list(executor.inflight.values())):
            # Tasks on one event loop run at once: which of them ended the process cannot be told.
            if self._concurrent or delivery.number == running:
                self._on_death(delivery, executor.killed_for or Lost(f"executor {executor.pid} {how}"))
            else:
                delivery.stage = Stage.WAITING
                self.waiting.appendleft(delivery)
        executor.inflight.clear()
