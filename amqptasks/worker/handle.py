"""An executor, as its leader sees it."""

from __future__ import annotations

import os
import signal
import socket
import time

from amqptasks.outcome import Failed
from amqptasks.worker.cell import Cell
from amqptasks.worker.delivery import Delivery
from amqptasks.worker.wire import FrameReader

__all__ = ["ExecutorHandle", "describe_exit"]


class ExecutorHandle:
    """The leader's side of one executor."""

    __slots__ = (
        "cell",
        "frames",
        "inflight",
        "killed_for",
        "lease",
        "output",
        "pid",
        "pidfd",
        "silent",
        "socket",
        "started",
    )

    def __init__(self, pid: int, channel: socket.socket, cell: Cell) -> None:
        self.pid = pid
        self.socket = channel
        self.pidfd = os.pidfd_open(pid)
        self.cell = cell
        self.started = time.monotonic()
        self.inflight: dict[int, Delivery] = {}
        self.frames = FrameReader()
        self.output = bytearray()
        self.lease = 0.0
        #: Nothing was heard of it since something was taken back from it.
        self.silent = False
        #: Why the leader killed it, for the outcome of the task that ran.
        self.killed_for: Failed | None = None

    def signal(self, number: int) -> None:
        """Send a signal; one that is gone already is fine."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


def describe_exit(status: int) -> str:
    """How a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"was killed by {signal.Signals(number).name}"
        except ValueError:
            return f"was killed by signal {number}"
    return f"exited with code {os.waitstatus_to_exitcode(status)}"
