"""The supervisor: parent of the process groups. It starts leaders, replaces those that die, and passes signals on.

It runs no task, holds no connection and has no threads. The application is imported once, before the forks, so that
all processes share its memory.
"""

from __future__ import annotations

import gc
import os
import random
import selectors
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.config import Settings
from amqptasks.errors import AmqpTasksError, BrokerUnreachable
from amqptasks.events import Bus
from amqptasks.worker.control import Command, News
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.leader import LeaderSetup, run_leader
from amqptasks.worker.process import fork_child, open_descriptors

__all__ = ["Interrupted", "Supervisor", "wait_for_broker"]

_RESPAWN_FIRST, _RESPAWN_MAX = 0.1, 10.0
_HEALTHY_SECONDS = 5.0
_KILL_AFTER = 5.0
#: The same signal again within so many seconds is the same request: `timeout` and some inits signal both the process
#: and its group.
_SAME_SIGNAL = 0.25
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)

_log = structlog.get_logger("amqptasks.worker")


class Interrupted(Exception):
    """A signal asked to stop before the worker had started."""


def wait_for_broker(app: AmqpTasks) -> None:
    """Declare the topology; while no node answers, try again with back-off, and say so.

    Raises `BrokerUnreachable` after ``broker.connection_max_retries``, at once with
    ``connection_retry_on_startup: false``; `AccessRefused` and `TopologyConflict` at once; `Interrupted` on a signal.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(signum).name)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _declare_with_patience(app, app.settings)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _declare_with_patience(app: AmqpTasks, settings: Settings) -> None:
    broker = settings.broker
    attempt = 0
    while True:
        try:
            app.declare()
            return
        except BrokerUnreachable as error:
            limit = broker.connection_max_retries if broker.connection_retry_on_startup else 0
            if limit is not None and attempt >= limit:
                raise
            pause = min(30.0, 0.5 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1.0)
            attempt += 1
            _log.warning(
                "Cannot reach the broker; trying again",
                error=str(error),
                seconds=round(pause, 1),
                attempt=attempt,
                of=limit if limit is not None else "unlimited",
            )
            time.sleep(pause)


class _LeaderHandle:
    """The supervisor's side of one leader."""

    def __init__(self, plan: GroupPlan) -> None:
        self.plan = plan
        self.pid = 0
        self.control: socket.socket | None = None
        self.started = 0.0
        self.ready = False
        self.respawn_at: float | None = 0.0
        self.respawn_delay = 0.0


class Supervisor:
    """Runs the process groups until a signal ends them."""

    def __init__(
        self, app: AmqpTasks, bus: Bus, plans: Sequence[GroupPlan], *, hostname: str, grace_period: float
    ) -> None:
        self._app = app
        self._bus = bus
        self._hostname = hostname
        self._grace = grace_period
        self._leaders = [_LeaderHandle(plan) for plan in plans]
        self._keep = open_descriptors()
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._last_signal, self._signalled_at = 0, 0.0
        self._draining = False
        self._deadline: float | None = None
        self._killing_at: float | None = None
        self._exit_code = 0
        self._said_ready = False
        self._declaring = 0
        self._declared_at = 0.0

    def run(self) -> int:
        """Run until stopped. Returns the exit code: 0 after an orderly stop, 1 after a hard one."""
        gc.collect()
        gc.freeze()
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        for number in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(number, self._signalled)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        self._selector.register(wake_read, selectors.EVENT_READ, None)
        try:
            while self._leaders_left():
                self._start_due()
                for key, _ in self._selector.select(self._timeout()):
                    if key.data is None:
                        wake_read.recv(4096)
                    else:
                        self._news(key.data)
                self._act_on_signals()
                self._reap()
                self._act_on_deadlines()
        finally:
            signal.set_wakeup_fd(-1)
            self._kill_all()
        _log.info("Stopped", exit_code=self._exit_code)
        return self._exit_code

    # -- leaders --------------------------------------------------------------------------------------------------

    def _leaders_left(self) -> bool:
        return not self._draining or any(leader.pid for leader in self._leaders)

    def _start_due(self) -> None:
        now = time.monotonic()
        for leader in self._leaders:
            if not self._draining and not leader.pid and leader.respawn_at is not None and now >= leader.respawn_at:
                self._start(leader)

    def _start(self, leader: _LeaderHandle) -> None:
        ours, theirs = socket.socketpair()
        setup = LeaderSetup(self._app, self._bus, leader.plan, self._hostname, self._keep)
        leader.pid = fork_child(lambda: run_leader(setup, theirs), keep=self._keep | {theirs.fileno()})
        theirs.close()
        ours.setblocking(False)
        leader.control = ours
        leader.started = time.monotonic()
        leader.ready = False
        leader.respawn_at = None
        self._selector.register(ours, selectors.EVENT_READ, leader)

    def _news(self, leader: _LeaderHandle) -> None:
        if leader.control is None:
            return
        try:
            news = leader.control.recv(256)
        except BlockingIOError:
            return
        except OSError:
            news = b""
        if not news:
            self._selector.unregister(leader.control)
            leader.control.close()
            leader.control = None
            return
        if News.READY in news:
            leader.ready = True
            if not self._said_ready and all(one.ready for one in self._leaders):
                self._said_ready = True
                _log.info(f"{self._hostname} ready.")
        if News.TOPOLOGY_MISSING in news:
            self._declare_again()

    def _declare_again(self) -> None:
        """A queue vanished: declare it in a process of its own, so that no signal waits for the broker."""
        now = time.monotonic()
        if self._declaring or now - self._declared_at < 1.0:
            return
        self._declared_at = now
        self._declaring = fork_child(self._declare_once, keep=self._keep)

    def _declare_once(self) -> int:
        try:
            self._app.declare()
        except AmqpTasksError as error:
            _log.error("Cannot declare the topology", error=str(error))
            return 1
        _log.info("Declared the topology again")
        return 0

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._declaring:
                self._declaring = 0
            for leader in self._leaders:
                if leader.pid == pid:
                    self._leader_died(leader, status)

    def _leader_died(self, leader: _LeaderHandle, status: int) -> None:
        leader.pid = 0
        if leader.control is not None:
            self._selector.unregister(leader.control)
            leader.control.close()
            leader.control = None
        if self._draining:
            return
        lived = time.monotonic() - leader.started
        if lived < _HEALTHY_SECONDS:
            leader.respawn_delay = min(max(_RESPAWN_FIRST, leader.respawn_delay * 2), _RESPAWN_MAX)
        else:
            leader.respawn_delay = 0.0
        leader.respawn_at = time.monotonic() + leader.respawn_delay
        _log.error(
            "Leader died; starting another",
            queue=leader.plan.queue,
            code=os.waitstatus_to_exitcode(status),
            lived=round(lived, 1),
            seconds=leader.respawn_delay,
        )

    # -- signals, deadlines ---------------------------------------------------------------------------------------

    def _signalled(self, signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGCHLD:
            self._signals.append(signum)

    def _act_on_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            self._act_on(number)
            self._last_signal, self._signalled_at = number, time.monotonic()

    def _act_on(self, number: int) -> None:
        if number == signal.SIGHUP:
            _log.warning("SIGHUP: rolling restarts are not available in this version; ignored")
        elif number == self._last_signal and time.monotonic() - self._signalled_at < _SAME_SIGNAL:
            return
        elif number == signal.SIGQUIT or self._draining:
            _log.warning("Stopping now: running tasks go back to their queues", signal=signal.Signals(number).name)
            self._draining = True
            self._exit_code = 1
            self._stop_hard()
        else:
            _log.info(
                "Stopping: running tasks finish, waiting ones go back",
                signal=signal.Signals(number).name,
                grace_period=self._grace,
            )
            self._draining = True
            self._deadline = time.monotonic() + self._grace
            self._command(Command.DRAIN)

    def _stop_hard(self) -> None:
        self._deadline = None
        self._killing_at = time.monotonic() + _KILL_AFTER
        self._command(Command.STOP)

    def _act_on_deadlines(self) -> None:
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            _log.warning("The grace period is over: what still runs goes back to its queue", seconds=self._grace)
            self._stop_hard()
        if self._killing_at is not None and now >= self._killing_at:
            self._killing_at = None
            self._kill_all()

    def _command(self, command: bytes) -> None:
        for leader in self._leaders:
            if leader.control is not None:
                try:
                    leader.control.send(command)
                except OSError:
                    continue  # it died: `_reap` sees to it

    def _kill_all(self) -> None:
        for leader in self._leaders:
            if leader.pid:
                try:
                    os.kill(leader.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _timeout(self) -> float | None:
        moments: list[Any] = [self._deadline, self._killing_at]
        if not self._draining:
            moments += [leader.respawn_at for leader in self._leaders if not leader.pid]
        due = [moment for moment in moments if moment is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None
