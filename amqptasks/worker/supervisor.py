"""The supervisor: parent of the process groups. It starts leaders, replaces those that die, and passes signals on.

It runs no task, holds no connection and has no threads. The application is imported once, before the forks, so that
all processes share its memory.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import structlog

from amqptasks.app import AmqpTasks
from amqptasks.errors import ConfigError
from amqptasks.events import Bus
from amqptasks.worker.children import Child
from amqptasks.worker.control import Command, Message, News
from amqptasks.worker.desk import DeskSetup, run_desk
from amqptasks.worker.event_switch import EventSwitch
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.leader import LeaderSetup, run_leader
from amqptasks.worker.lifecycle import Lifecycle
from amqptasks.worker.listening import Listening
from amqptasks.worker.process import fork_child, open_descriptors
from amqptasks.worker.redeclare import Redeclaring
from amqptasks.worker.stacks import dump_all, dump_on_signal
from amqptasks.worker.switchboard import Switchboard
from amqptasks.worker.takeover import Adopted, run_trial, take_over

__all__ = ["Supervisor"]

_KILL_AFTER = 5.0
#: The same signal again within so many seconds is the same request: `timeout` and some inits signal both the process
#: and its group.
_SAME_SIGNAL = 0.25
#: Questions about single tasks: for leaders on their way out, too.
_OF_TASKS = ("active", "reserved", "query", "revoke")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)

_log = structlog.get_logger("amqptasks.worker")


class Supervisor:
    """Runs the process groups until a signal ends them.

    Args:
        plan: the plan of a queue that is added later; raises `ConfigError`.
        listening: the socket of the HTTP server.
        task_events: whether events are sent from the start; those about the worker are the desk's.
        adopted: what this process's old program left: its leaders are drained when the new ones consume.
        lifecycle: tells of what happens to the worker.
        beat: runs a scheduler, with its end of a socket pair, until something is read from it.
    """

    def __init__(
        self,
        app: AmqpTasks,
        bus: Bus,
        plans: Sequence[GroupPlan],
        *,
        hostname: str,
        grace_period: float,
        plan: Callable[[str], GroupPlan],
        listening: Listening | None = None,
        task_events: bool = False,
        adopted: Adopted | None = None,
        lifecycle: Lifecycle,
        beat: Callable[[socket.socket], int] | None = None,
    ) -> None:
        self._lifecycle = lifecycle
        self._app, self._bus = app, bus
        self._hostname, self._grace = hostname, grace_period
        self._plan = plan
        self._events = EventSwitch(task_events)
        old = adopted or Adopted()
        self._boards = old.boards
        self._listening = listening
        self._keep = open_descriptors() - old.descriptors - (listening.descriptors if listening else frozenset())
        self._redeclaring = Redeclaring(app, self._keep)
        self._leaders = [*old.leaders, *map(self._leader, plans)]
        self._helpers: list[Child] = []
        if app.settings.worker.remote_control or task_events or listening is not None:
            setup = DeskSetup(app, hostname, time.time(), self._events, listening)
            self._helpers.append(Child("desk", lambda end: run_desk(setup, end), listening=listening))
        if beat is not None:
            self._helpers.append(Child("beat", beat))
        self._switchboard = Switchboard()
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._last_signal, self._signalled_at = 0, 0.0
        self._draining = False
        self._deadline: float | None = None
        self._killing_at: float | None = None
        self._exit_code = 0
        self._said_ready = False
        self._trial = 0

    def _leader(self, plan: GroupPlan) -> Child:
        board = self._boards.open(plan.queue)
        setup = LeaderSetup(self._app, self._bus, plan, self._hostname, self._keep, board, self._events)
        return Child(plan.queue, lambda end: run_leader(setup, end), plan, board=board)

    def run(self, signalled: Sequence[int] = ()) -> int:
        """Run until stopped. Returns the exit code: 0 after an orderly stop, 1 after a hard one.

        `signalled`: what was asked for already.
        """
        gc.collect()
        gc.freeze()
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        for number in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(number, self._signalled)
        dump_on_signal(then=self._signalled)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        self._selector.register(wake_read, selectors.EVENT_READ, None)
        for child in self._leaders:
            if child.channel is not None:
                self._selector.register(child.channel, selectors.EVENT_READ, child)
        self._signals += signalled
        self._act_on_signals()
        try:
            while not self._draining or self._anyone_left():
                self._start_due()
                self._lifecycle.tick(all(one.ready for one in self._leaders))
                for key, events in self._selector.select(self._timeout()):
                    if key.data is None:
                        wake_read.recv(4096)
                    else:
                        self._talk(key.data, events)
                self._act_on_signals()
                self._reap()
                self._act_on_deadlines()
                self._bus.flush()  # no line of log waits for the next
        finally:
            signal.set_wakeup_fd(-1)
            for child in self._children:
                child.kill()
        self._lifecycle.stopped()
        _log.info("Stopped", exit_code=self._exit_code)
        self._bus.flush()
        return self._exit_code

    # -- children -------------------------------------------------------------------------------------------------

    @property
    def _children(self) -> list[Child]:
        return [*self._leaders, *self._helpers]

    def _anyone_left(self) -> bool:
        if any(leader.pid for leader in self._leaders):
            return True
        # The desk answers until the last leader has gone.
        for helper in self._helpers:
            if helper.pid and not helper.retired:
                helper.retired = True
                helper.send(Command.STOP)
                self._killing_at = self._killing_at or time.monotonic() + _KILL_AFTER
        return any(helper.pid for helper in self._helpers)

    def _start_due(self) -> None:
        if self._draining:
            return
        for child in self._children:
            if child.due:
                child.start(self._keep)
                assert child.channel is not None
                self._selector.register(child.channel, selectors.EVENT_READ, child)

    def _talk(self, child: Child, events: int) -> None:
        if child.channel is None:
            return
        if events & selectors.EVENT_WRITE:
            child.channel.flush()
        if events & selectors.EVENT_READ:
            messages = child.channel.receive()
            if messages is None:
                self._hang_up(child)
                return
            for message in messages:
                self._news(child, message)
        self._watch(child)

    def _watch(self, child: Child) -> None:
        """Wait for room in the socket of a child that was sent more than fits."""
        if child.channel is not None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.channel.pending else 0)
            if self._selector.get_key(child.channel).events != events:
                self._selector.modify(child.channel, events, child)

    def _hang_up(self, child: Child) -> None:
        if child.channel is not None:
            self._selector.unregister(child.channel)
            child.channel.close()
            child.channel = None

    def _news(self, child: Child, message: Message) -> None:
        match message[0]:
            case News.READY:
                child.ready = True
                self._leader_ready()
            case News.PULSE:
                child.pulsed(message[1])
            case News.TOPOLOGY_MISSING:
                self._redeclaring.begin(replaced=message[1])
            case News.ANSWER:
                self._switchboard.answered(child, message[1], message[2])
            case Command.ASK:
                self._asked(child, *message[1:])

    def _leader_ready(self) -> None:
        if self._said_ready or not all(one.ready for one in self._leaders if not one.retired):
            return
        self._said_ready = True
        _log.info(f"{self._hostname} ready.")
        self._lifecycle.ready()
        for leader in self._leaders:
            if leader.retired:
                leader.send(Command.DRAIN)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._redeclaring.reaped(pid)
            if pid == self._trial:
                self._trial = 0
                self._tried(os.waitstatus_to_exitcode(status))
            for child in self._children:
                if child.pid == pid:
                    self._died(child, status)

    def _died(self, child: Child, status: int) -> None:
        self._hang_up(child)
        lived = child.died()
        if child.retired:
            if child in self._leaders:
                self._forget(child)
        elif not self._draining:
            _log.error(
                "Leader died; starting another" if child.plan else "A process died; starting another",
                queue=child.name,
                code=os.waitstatus_to_exitcode(status),
                lived=round(lived, 1),
                seconds=child.respawn_delay,
            )

    def _forget(self, leader: Child) -> None:
        self._leaders.remove(leader)
        self._boards.free(leader.board)

    # -- the desk's questions -------------------------------------------------------------------------------------

    def _asked(self, desk: Child, ticket: int, method: str, arguments: dict[str, Any]) -> None:
        def reply(answers: dict[str, Any]) -> None:
            desk.send(News.ANSWER, ticket, {"worker": self._state(), "queues": answers})
            self._watch(desk)

        match method:
            case "shutdown":
                if not self._draining:  # a second signal would be a hard stop
                    self._signals.append(signal.SIGTERM)
                reply({})
            case "counts":
                reply(self._boards.counts())
            case "add_consumer" | "cancel_consumer":
                queue = str(arguments.get("queue"))
                act = self._add_queue if method == "add_consumer" else self._cancel_queue
                reply({queue: act(queue)})
            case _:
                asked = [one for one in self._leaders if one.hears and (method in _OF_TASKS or not one.retired)]
                self._switchboard.ask(asked, method, arguments, reply)
                for leader in asked:
                    self._watch(leader)

    def _state(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "draining": self._draining,
            "was_ready": self._said_ready,
            "groups": {one.name: one.state() for one in self._leaders if not one.retired},
            "helpers": {one.name: one.state() for one in self._helpers},
        }

    def _add_queue(self, queue: str) -> dict[str, str]:
        if any(leader.name == queue and not leader.retired for leader in self._leaders):
            return {"ok": f"already consuming from {queue!r}"}
        try:
            plan = self._plan(queue)
        except ConfigError as error:
            return {"error": str(error)}
        if not self._draining:
            self._leaders.append(self._leader(plan))
        return {"ok": f"add consumer {queue}"}

    def _cancel_queue(self, queue: str) -> dict[str, str]:
        for leader in self._leaders:
            if leader.name == queue and not leader.retired:
                leader.retired = True
                leader.send(Command.DRAIN)
                if not leader.pid:
                    self._forget(leader)
                return {"ok": f"no longer consuming from {queue}"}
        return {"error": f"not consuming from {queue!r}"}

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
        if number == self._last_signal and time.monotonic() - self._signalled_at < _SAME_SIGNAL:
            return
        if number == signal.SIGUSR1:
            dump_all((one.name, one.pid) for one in self._children if one.pid)
        elif number == signal.SIGHUP:
            self._reload()
        elif number == signal.SIGQUIT or self._draining:
            _log.warning("Stopping now: running tasks go back to their queues", signal=signal.Signals(number).name)
            self._draining = True
            self._exit_code = 1
            self._stop_hard()
            self._lifecycle.stopping(number, self._exit_code)
        else:
            _log.info(
                "Stopping: running tasks finish, waiting ones go back",
                signal=signal.Signals(number).name,
                grace_period=self._grace,
            )
            self._draining = True
            self._deadline = time.monotonic() + self._grace
            self._command(Command.DRAIN)
            self._lifecycle.stopping(number, self._exit_code)

    def _reload(self) -> None:
        if self._draining or self._trial:
            return
        _log.info("SIGHUP: trying the new code and settings")
        self._lifecycle.reloading()
        self._trial = fork_child(run_trial, keep=self._keep)

    def _tried(self, code: int) -> None:
        if self._draining:
            return
        if code != 0:
            _log.error("The new code or settings do not start; going on with the old", code=code)
            self._lifecycle.reload_failed()
            return
        _log.info("Taking over with the new code")
        for helper in self._helpers:
            helper.kill()
        take_over(self._leaders, self._boards, self._listening)

    def _stop_hard(self) -> None:
        self._deadline = None
        self._killing_at = time.monotonic() + _KILL_AFTER
        self._command(Command.STOP)

    def _act_on_deadlines(self) -> None:
        now = time.monotonic()
        self._switchboard.expire()
        if self._deadline is not None and now >= self._deadline:
            _log.warning("The grace period is over: what still runs goes back to its queue", seconds=self._grace)
            self._stop_hard()
        if self._killing_at is not None and now >= self._killing_at:
            self._killing_at = None
            for child in self._children:
                child.kill()

    def _command(self, command: str) -> None:
        for child in self._children:
            child.send(command)

    def _timeout(self) -> float | None:
        moments = [self._deadline, self._killing_at, self._switchboard.next_deadline, self._lifecycle.next_tick]
        if not self._draining:
            moments += [child.respawn_at for child in self._children if not child.pid and not child.retired]
        due = [moment for moment in moments if moment is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None
