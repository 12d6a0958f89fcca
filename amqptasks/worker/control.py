"""What the processes of a worker say to each other over their socket pairs.

A message is a tuple whose first item names it. The supervisor stands between: leaders and the desk speak to it only.
"""

from __future__ import annotations

import marshal
import socket
import struct
from collections.abc import Callable
from typing import Any

import structlog

from amqptasks.events import BeatPulse
from amqptasks.worker.wire import FrameReader

__all__ = ["Channel", "Command", "Message", "News"]

Message = tuple[Any, ...]
_LENGTH = struct.Struct("!I")
_READ = 1 << 16
_AGAIN_SECONDS = 0.01
_log = structlog.get_logger("amqptasks.worker")


class Command:
    """What the supervisor tells a leader or the desk."""

    DRAIN = "drain"
    STOP = "stop"
    #: (ASK, ticket, method, arguments): a leader answers it at once, whatever its executors do.
    ASK = "ask"


class News:
    """What a leader or the desk tells the supervisor."""

    READY = "ready"
    #: (TOPOLOGY_MISSING, whether it is but bindings, perhaps, of a queue that somebody has replaced)
    TOPOLOGY_MISSING = "topology-missing"
    #: (PULSE, values): of a beat, each second.
    PULSE = "pulse"
    #: (ANSWER, ticket, payload)
    ANSWER = "answer"


class Channel:
    """One end of a socket pair. Nothing here blocks: what does not fit in the socket waits in `pending`.

    `marshal` is safe here: both ends are forks of one process, or that process after it has replaced its own program
    with the same interpreter.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._frames = FrameReader()
        #: Whether what comes is thrown away: the other end may be in the middle of a message to somebody else.
        self.deaf = False
        self.pending = bytearray()
        self._delivering = False

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def send(self, *message: Any) -> None:
        """Send a message. To an end that is gone it goes nowhere: who watches the process sees to that."""
        try:
            data = marshal.dumps(message)
        except ValueError as error:  # what strangers sent is told on here, and must not end who tells it
            _log.error("Cannot be told", message=str(message[0]), error=str(error))
            data = marshal.dumps((*message[:-1], {"error": f"cannot be told: {error}"}))
        self.pending += _LENGTH.pack(len(data)) + data
        self.flush()

    def tell_pulse(self, pulse: BeatPulse) -> None:
        """Say that this process, a beat, lives; nothing when its supervisor has not read the last ones."""
        if not self.pending:
            tick = None if pulse.last_tick is None else pulse.last_tick.timestamp()
            due = None if pulse.next_due is None else pulse.next_due.timestamp()
            values = {"connected": pulse.connected, "leads": pulse.leads, "last_tick": tick, "next_due": due}
            self.send(News.PULSE, values)

    def deliver(self, call_later: Callable[[float, Callable[[], None]], Any], *message: Any) -> None:
        """Send a message, and what does not fit now as soon as it does; `call_later` is the loop's timer."""
        self.send(*message)
        if self.pending and not self._delivering:
            self._delivering = True
            call_later(_AGAIN_SECONDS, lambda: self._again(call_later))

    def _again(self, call_later: Callable[[float, Callable[[], None]], Any]) -> None:
        self.flush()
        if self.pending:
            call_later(_AGAIN_SECONDS, lambda: self._again(call_later))
        else:
            self._delivering = False

    def tell_ready(self) -> None:
        """Say that this process does what it is there for."""
        self.send(News.READY)

    def flush(self) -> None:
        """Send what waits, as far as it fits."""
        if not self.pending:
            return
        try:
            del self.pending[: self._socket.send(self.pending)]
        except BlockingIOError:
            return
        except OSError:
            self.pending.clear()

    def receive(self) -> list[Message] | None:
        """The messages that have come; None when the other end is closed."""
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        if self.deaf:
            return []
        # Written by a process of this worker: see the class.
        return [marshal.loads(frame) for frame in self._frames.feed(data)]  # noqa: S302 - of a fork of this process

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
