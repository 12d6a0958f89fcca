"""The executors of one queue: how many there are, which of them leave, and what follows them.

An executor that leaves gets nothing more, finishes what it has, and exits when its socket ends; its successor is
forked at once, so that capacity does not dip meanwhile.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import structlog

from amqptasks.worker.cell import MOST_SLOTS, Cell
from amqptasks.worker.executor import ExecutorSetup, run_executor
from amqptasks.worker.greenlets import Inherited, execute
from amqptasks.worker.group import CONCURRENT_POOLS, Recycling
from amqptasks.worker.handle import ExecutorHandle, describe_exit
from amqptasks.worker.process import fork_child

__all__ = ["Fleet", "Loop"]

_RESPAWN_FIRST, _RESPAWN_MAX = 0.1, 10.0
#: An executor that died younger than this counts as one that cannot live.
_INFANT_SECONDS = 1.0
#: Time to exit for an executor that has nothing left to do.
_LEAVE_SECONDS = 30.0
#: An executor that holds tasks may be stopped for so long; with none that runs: it has not reported what has ended.
_STOPPED_SECONDS, _STOPPED_UNREPORTED_SECONDS = 30.0, 5.0
#: Executors are replaced at this share of their limits or later, each at another, so that they do not go together.
_JITTER = 0.9

_log = structlog.get_logger("amqptasks.worker")


class Loop(Protocol):
    """The I/O loop, as executors' leaders use it (pika's)."""

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


class Fleet:
    """Forks executors, lets them go, and reaps them. Belongs to the leader's loop.

    Args:
        size: how many there are to be.
        keep: descriptors that stay open in executors.
        recycling: when executors are replaced.
        on_events: called when an executor's socket is ready.
        on_death: called with an executor that is gone, and how it ended; it is out of `executors` already.
        on_capacity: called when a successor is there.
    """

    def __init__(
        self,
        loop: Loop,
        setup: ExecutorSetup,
        size: int,
        keep: frozenset[int],
        recycling: Recycling,
        *,
        on_events: Callable[[ExecutorHandle, int], None],
        on_death: Callable[[ExecutorHandle, str], None],
        on_capacity: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._setup = setup
        self._keep = keep
        self._recycling = recycling
        self._on_events = on_events
        self._on_death = on_death
        self._on_capacity = on_capacity
        self.size = size
        self.executors: list[ExecutorHandle] = []
        #: Executors that ended, by cause.
        self.restarts: dict[str, int] = {}
        self.closing = False
        self._respawn_delay = 0.0
        self._rolling: list[ExecutorHandle] = []

    @property
    def staying(self) -> list[ExecutorHandle]:
        """Those that take work: not leaving, and no wards."""
        return [one for one in self.executors if one.leaving is None and one.killed is None and not one.ward]

    # -- coming ---------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Fork what is missing."""
        if not self.closing:
            for _ in range(self.size - len(self.staying)):
                self.spawn()

    def spawn(self, *, ward: bool = False) -> ExecutorHandle:
        """Fork one executor."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        setup = self._setup
        if setup.pool == "gevent":
            memory = os.memfd_create("amqptasks")
            os.ftruncate(memory, Cell.size(MOST_SLOTS))
            cell = Cell(MOST_SLOTS, memory)
            this = Inherited(setup.queue, setup.hostname, setup.concurrency, theirs.fileno(), memory, setup.events.file)
            pid = fork_child(lambda: execute(this), keep=self._keep | {theirs.fileno(), memory, setup.events.file})
            os.close(memory)
        else:
            cell = Cell(MOST_SLOTS if setup.pool in CONCURRENT_POOLS else 1)
            pid = fork_child(lambda: run_executor(setup, theirs, cell), keep=self._keep | {theirs.fileno()})
        theirs.close()
        ours.setblocking(False)
        executor = ExecutorHandle(pid, ours, cell, ward=ward)
        self._ration(executor)
        self.executors.append(executor)
        self._loop.add_handler(ours.fileno(), lambda _fd, events: self._on_events(executor, events), self._loop.READ)
        self._loop.add_handler(executor.pidfd, lambda _fd, _events: self._reap(executor), self._loop.READ)
        return executor

    def _ration(self, executor: ExecutorHandle) -> None:
        limits = self._recycling
        if limits.tasks is not None:
            executor.quota = max(1, round(limits.tasks * random.uniform(_JITTER, 1.0)))
        if limits.memory is not None:
            executor.grown = int(limits.memory * random.uniform(_JITTER, 1.0))

    # -- going ----------------------------------------------------------------------------------------------------

    def retire(self, executor: ExecutorHandle, cause: str) -> None:
        """Give it nothing more; it goes when it has finished. Its successor comes now."""
        if executor.leaving is None and executor.killed is None:
            executor.leaving = cause
            self.fill()
            self.dismiss(executor)

    def dismiss(self, executor: ExecutorHandle) -> None:
        """Let an executor that is leaving and has finished go."""
        if executor.leaving is not None and not executor.inflight and not executor.dismissed:
            executor.dismissed = time.monotonic()
            with suppress(OSError):
                executor.socket.shutdown(socket.SHUT_WR)

    def resize(self, size: int) -> None:
        """Have so many: new ones now, and those with least to do leave as they finish."""
        self.size = size
        self.fill()
        staying = sorted(self.staying, key=lambda one: len(one.inflight))
        for executor in staying[: max(0, len(staying) - size)]:
            self.retire(executor, "resized")

    def roll(self) -> None:
        """Replace all, one after another."""
        self._rolling = self.staying

    def tick(self) -> None:
        """Once in a while: the next one of a roll, and those that were let go and do not go."""
        overdue = time.monotonic() - _LEAVE_SECONDS
        for executor in self.executors:
            self.dismiss(executor)  # its last outcome may have been read when something was taken back from it
            if executor.dismissed and executor.dismissed < overdue and executor.killed is None:
                _log.error("Executor killed: it does not exit", queue=self._setup.queue, pid=executor.pid)
                executor.kill(executor.leaving or "left")
        self._rolling = [one for one in self._rolling if one in self.executors]
        if self._rolling and not any(one.leaving == "rolled" for one in self._rolling):
            self.retire(min(self._rolling, key=lambda one: len(one.inflight)), "rolled")
            self._on_capacity()

    def weigh(self) -> None:
        """Once a second: let those go that have grown beyond their memory, or are stopped."""
        self._end_stopped()
        limits = self._recycling
        if limits.memory is None and limits.memory_hard is None:
            return
        for executor in list(self.executors):
            resident = executor.resident()
            if limits.memory_hard is not None and resident > limits.memory_hard and executor.killed is None:
                _log.error("Executor killed: it passed the hard limit of memory", pid=executor.pid, bytes=resident)
                executor.kill("memory_hard")
            elif executor.grown is not None and resident > executor.grown and executor.leaving is None:
                _log.info("Executor leaves: it has grown", pid=executor.pid, bytes=resident, queue=self._setup.queue)
                self.retire(executor, "recycled_memory")
                self._on_capacity()

    def _end_stopped(self) -> None:
        """Kill those that hold tasks and were stopped (SIGSTOP) long ago: without a time limit nothing else would."""
        now = time.monotonic()
        for executor in self.executors:
            oldest = next(iter(executor.inflight), 0)
            known, since = executor.stood
            if oldest != known or not oldest or not executor.stopped:
                executor.stood = (oldest, now)
                continue
            runs = not executor.inflight.keys().isdisjoint(executor.running())
            allowed = _STOPPED_SECONDS if runs else _STOPPED_UNREPORTED_SECONDS
            if now - since > allowed and executor.killed is None:
                _log.error("Executor killed: it is stopped, with tasks", queue=self._setup.queue, pid=executor.pid)
                executor.kill("silent")

    def close(self) -> None:
        """End all: those that run something at once, the idle ones in their own time."""
        self.closing = True
        for executor in self.executors:
            if executor.inflight:
                executor.inflight.clear()
                executor.signal(signal.SIGKILL)
            else:
                with suppress(OSError):
                    executor.socket.shutdown(socket.SHUT_WR)

    # -- gone -----------------------------------------------------------------------------------------------------

    def healthy(self) -> None:
        """An executor has finished a task: those that follow need not wait."""
        self._respawn_delay = 0.0

    def _reap(self, executor: ExecutorHandle) -> None:
        self._loop.remove_handler(executor.pidfd)
        _, status = os.waitpid(executor.pid, 0)
        self.executors.remove(executor)
        how = describe_exit(status)
        self._on_death(executor, how)
        with suppress(KeyError, ValueError):  # at the end of its file it may have been removed already
            self._loop.remove_handler(executor.socket.fileno())
        os.close(executor.pidfd)
        executor.socket.close()
        executor.cell.close()
        if self.closing:
            return
        expected = executor.leaving if status == 0 else None
        cause = executor.killed or expected or "died"
        self.restarts[cause] = self.restarts.get(cause, 0) + 1
        if cause == "died":
            _log.error("Executor died", queue=self._setup.queue, pid=executor.pid, how=how)
            if time.monotonic() - executor.started < _INFANT_SECONDS:
                # It dies as soon as it lives: do not spin.
                self._respawn_delay = min(max(_RESPAWN_FIRST, self._respawn_delay * 2), _RESPAWN_MAX)
        self._loop.call_later(self._respawn_delay, self._follow)

    def _follow(self) -> None:
        self.fill()
        self._on_capacity()
