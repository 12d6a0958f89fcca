"""Executors of the gevent pool: programs of their own, patched before anything of the application is imported.

The supervisor has imported the application long before it forks, so that it is too late to patch there; and leaders
must not be patched at all. Such an executor therefore executes the worker's command line anew, with gevent's patches
as its very first step, and finds its socket and its shared memory in the environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

from amqptasks.errors import SoftTimeLimitExceeded
from amqptasks.execution.interrupts import Terminated
from amqptasks.worker.arguments import handed_on
from amqptasks.worker.cell import MOST_SLOTS, Cell
from amqptasks.worker.process import ignore_group_signals

__all__ = ["GreenletInterrupts", "Inherited", "execute", "inherited"]

_VARIABLE = "AMQPTASKS_EXECUTOR"
_PROGRAM = "from gevent import monkey; monkey.patch_all(); from amqptasks.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Inherited:
    """What an executor that is a program of its own gets from its leader."""

    queue: str
    hostname: str
    concurrency: int
    channel: int
    memory: int
    events: int

    def open(self) -> tuple[socket.socket, Cell]:
        """The socket and the shared memory."""
        return socket.socket(fileno=self.channel), Cell(MOST_SLOTS, self.memory)


def execute(this: Inherited) -> NoReturn:
    """In a fork of the leader: become such an executor."""
    # Signals for the process group wait until the new program has its handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
    for descriptor in (this.channel, this.memory, this.events):
        os.set_inheritable(descriptor, True)
    text = json.dumps([this.queue, this.hostname, this.concurrency, this.channel, this.memory, this.events])
    command = [sys.executable, "-c", _PROGRAM, *sys.argv[1:]]
    os.execve(sys.executable, command, {**handed_on(), _VARIABLE: text})  # noqa: S606 - the worker's own command line


def inherited() -> Inherited | None:
    """What this process was started with, if it is such an executor."""
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    ignore_group_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
    found = Inherited(*json.loads(text))
    for descriptor in (found.channel, found.memory, found.events):
        os.set_inheritable(descriptor, False)
    return found


class GreenletInterrupts:
    """Interrupts for greenlets: see `amqptasks.execution.interrupts.Interrupts`."""

    def __init__(self, gevent: Any) -> None:
        self._gevent = gevent

    def soft_limit(self, seconds: float) -> AbstractContextManager[None]:
        """A timeout of gevent's."""
        limit: AbstractContextManager[None] = self._gevent.Timeout(seconds, SoftTimeLimitExceeded(f"{seconds:g} s"))
        return limit

    def me(self) -> Any:
        """The calling greenlet."""
        return self._gevent.getcurrent()

    def end(self, who: Any) -> None:
        """Raise it at the greenlet's next turn."""
        self._gevent.kill(who, Terminated)

    def calm(self, who: Any) -> None:
        """What is on its way to this greenlet arrives now, where it is caught."""
        self._gevent.sleep(0)
