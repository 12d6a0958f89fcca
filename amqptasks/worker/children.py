"""The processes that the supervisor keeps alive, as it sees them."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from amqptasks.worker.board import Board
from amqptasks.worker.control import Channel
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.listening import Listening
from amqptasks.worker.process import fork_child

__all__ = ["Child"]

_RESPAWN_FIRST, _RESPAWN_MAX = 0.1, 10.0
_HEALTHY_SECONDS = 5.0


class Child:
    """A leader, or a helper such as the desk.

    Args:
        main: what the process runs, with its end of the socket pair; its value is the exit code.
        plan: of a leader.
        board: a leader's counters; its successors go on with them.
        listening: a socket that it inherits.
    """

    def __init__(
        self,
        name: str,
        main: Callable[[socket.socket], int] | None,
        plan: GroupPlan | None = None,
        *,
        board: Board | None = None,
        listening: Listening | None = None,
    ) -> None:
        self.name = name
        self.plan = plan
        self._main = main
        self.board = board
        self._listening = frozenset() if listening is None else listening.descriptors
        self.pid = 0
        self.channel: Channel | None = None
        self.started = 0.0
        self.ready = False
        #: It is on its way out and gets no successor.
        self.retired = False
        self.restarts = 0
        self._pulse: tuple[float, dict[str, Any]] = (0.0, {})
        self.respawn_at: float | None = 0.0
        self.respawn_delay = 0.0

    @classmethod
    def adopted(cls, queue: str, pid: int, descriptor: int, board: Board) -> Child:
        """A leader that runs already: the old program of this process started it."""
        child = cls(queue, None, board=board)
        child.pid = pid
        child.channel = Channel(socket.socket(fileno=descriptor))
        child.channel.deaf = True
        os.set_inheritable(descriptor, False)
        child.retired = True
        child.respawn_at = None
        return child

    @property
    def hears(self) -> bool:
        """Whether it can be asked, and its answer be read."""
        return self.channel is not None and not self.channel.deaf

    @property
    def due(self) -> bool:
        """Whether it is time to start it."""
        return not self.pid and not self.retired and self.respawn_at is not None and time.monotonic() >= self.respawn_at

    def start(self, keep: frozenset[int]) -> None:
        """Fork it."""
        main = self._main
        assert main is not None
        ours, theirs = socket.socketpair()
        self.pid = fork_child(lambda: main(theirs), keep=keep | self._listening | {theirs.fileno()})
        theirs.close()
        self.channel = Channel(ours)
        self.started = time.monotonic()
        self.ready = False
        self.respawn_at = None

    def died(self) -> float:
        """Note its end, and when its successor is due. Returns the seconds that it lived."""
        self.pid = 0
        self.ready = False
        self.restarts += 1
        lived = time.monotonic() - self.started
        if lived < _HEALTHY_SECONDS:
            self.respawn_delay = min(max(_RESPAWN_FIRST, self.respawn_delay * 2), _RESPAWN_MAX)
        else:
            self.respawn_delay = 0.0
        self.respawn_at = time.monotonic() + self.respawn_delay
        return lived

    def pulsed(self, values: dict[str, Any]) -> None:
        """It said that it lives, and how it is."""
        self._pulse = (time.monotonic(), values)

    def state(self) -> dict[str, Any]:
        """What the desk is told of it. A pulse has its age in seconds."""
        at, values = self._pulse
        pulse = {"age": time.monotonic() - max(at, self.started), **values} if self.pid else {}
        return {"pid": self.pid, "ready": self.ready, "restarts": self.restarts, "pulse": pulse}

    def send(self, *message: object) -> None:
        """Tell it something, if it is there."""
        if self.channel is not None:
            self.channel.send(*message)

    def signal(self, number: int) -> None:
        """Send a signal; one that is gone already is fine."""
        if self.pid:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)
