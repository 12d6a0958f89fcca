"""A TCP proxy between client and broker that breaks on demand."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from types import TracebackType
from typing import Self

__all__ = ["TcpProxy"]

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with zero seconds: close sends RST


class TcpProxy:
    """Listens on `port` of the loopback (a free one by default) and forwards to `host:target_port`.

    `frames`: what passes is AMQP without TLS, and is forwarded in whole frames; `swallow_confirms` needs that.
    """

    def __init__(self, host: str, target_port: int, *, port: int = 0, frames: bool = False) -> None:
        self._target = (host, target_port)
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", port))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._stalled = threading.Event()
        self._refusing = False
        self._delay = 0.0
        self._late: deque[tuple[float, socket.socket, bytes]] = deque()  # when it is due, from whom; b"" is its end
        self._frames = frames
        self._filters: dict[socket.socket, _Filter] = {}
        self._deaf: set[socket.socket] = set()
        self._stopping = False
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._thread.join(5)
        self.cut()
        self._listener.close()
        self._selector.close()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        with self._lock:
            return len(self._pairs) // 2

    def cut(self) -> None:
        """Reset every connection, on both sides."""
        with self._lock:
            for one in list(self._pairs):
                self._drop(one)

    def stall(self) -> None:
        """Forward nothing more; connections stay open. New ones are taken and get no answer."""
        self._stalled.set()

    def resume(self) -> None:
        """Forward again, from where it stopped."""
        self._stalled.clear()

    def delay(self, seconds: float) -> None:
        """Forward everything so much later from now on, in both directions and in order; 0 ends it."""
        self._delay = seconds

    def deafen(self) -> None:
        """Pass nothing more on connections that are open now, which stay open for both sides. New ones are as ever."""
        with self._lock:
            self._deaf |= set(self._pairs)

    def refuse(self) -> None:
        """Reset every connection, and every new one at once."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Take connections again."""
        self._refusing = False

    def swallow_confirms(self) -> None:
        """Keep what the broker confirms from reaching clients, on channels that are open now. All else passes."""
        assert self._frames, "this proxy does not read frames"
        with self._lock:
            for one in self._filters.values():
                one.swallow()

    def swallow_deliveries(self) -> None:
        """Keep messages from reaching consumers, on channels that are open now. All else passes."""
        assert self._frames, "this proxy does not read frames"
        with self._lock:
            for one in self._filters.values():
                one.swallow(content=True)

    def swallow_opened(self) -> None:
        """Keep clients from hearing that a channel is open, on connections that stand now. All else passes."""
        assert self._frames, "this proxy does not read frames"
        with self._lock:
            for one in self._filters.values():
                one.opens = False

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(self._patience()):
                if key.fileobj is self._listener:
                    self._open()
                elif not self._stalled.is_set():
                    assert isinstance(key.fileobj, socket.socket)
                    self._forward(key.fileobj)
            if self._stalled.is_set():
                threading.Event().wait(0.02)  # readable sockets stay readable: do not spin
            else:
                self._forward_late()

    def _patience(self) -> float:
        """How long to wait for sockets."""
        late = self._late
        return 0.02 if not late else min(0.02, max(0.0, late[0][0] - time.monotonic()))

    def _forward_late(self) -> None:
        while self._late and self._late[0][0] <= time.monotonic():
            _, source, data = self._late.popleft()
            self._pass(source, data)

    def _open(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        if self._refusing:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        try:
            server = socket.create_connection(self._target, timeout=5)
        except OSError:
            client.close()
            return
        with self._lock:
            for one, other in ((client, server), (server, client)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                one.settimeout(5)
                self._pairs[one] = other
                if one is server and self._frames:
                    self._filters[one] = _Filter()
                self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        try:
            data = source.recv(1 << 16)
        except OSError:
            data = b""
        if not (self._delay or self._late):
            self._pass(source, data)
            return
        if not data:  # it stays readable: do not spin
            with self._lock, contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(source)
        # What comes after a delay has ended still waits for what came before.
        due = max(time.monotonic() + self._delay, self._late[-1][0] if self._late else 0.0)
        self._late.append((due, source, data))

    def _pass(self, source: socket.socket, data: bytes) -> None:
        """Forward what has come, or with nothing its end."""
        with self._lock:
            target = self._pairs.get(source)
            found = self._filters.get(source)
            deaf = source in self._deaf
        if target is None or (deaf and data):
            return
        if data:
            with contextlib.suppress(OSError):
                target.sendall(data if found is None else found.passed(data))
                return
        with self._lock:
            self._drop(source)

    def _drop(self, one: socket.socket) -> None:
        other = self._pairs.pop(one, None)
        if other is None:
            return
        self._pairs.pop(other, None)
        for each in (one, other):
            self._filters.pop(each, None)
            self._deaf.discard(each)
            with contextlib.suppress(OSError, KeyError, ValueError):
                self._selector.unregister(each)
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            each.close()


class _Filter:
    """Takes frames out of what a broker sends (AMQP 0-9-1, 2.3.5: frames)."""

    _CONFIRMS = (b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x78")
    _DELIVER = b"\x00\x3c\x00\x3c"
    _OPENED = b"\x00\x14\x00\x0b"

    def __init__(self) -> None:
        self._rest = b""
        self._seen: set[int] = set()
        self._unconfirmed: set[int] = set()
        self._undelivered: set[int] = set()
        #: Whether channel.open-ok passes.
        self.opens = True

    def swallow(self, *, content: bool = False) -> None:
        """From now on, on the channels that were heard of: deliveries, or else confirms."""
        deaf = self._undelivered if content else self._unconfirmed
        deaf |= self._seen

    def _swallowed(self, kind: int, channel: int, method: bytes) -> bool:
        if not self.opens and kind == 1 and method == self._OPENED:
            return True
        if channel in self._undelivered:
            return kind in (2, 3) or (kind == 1 and method == self._DELIVER)
        return channel in self._unconfirmed and kind == 1 and method in self._CONFIRMS

    def passed(self, data: bytes) -> bytes:
        """What reaches the client of it: whole frames."""
        data = self._rest + data
        frames, at = [], 0
        while len(data) - at >= 7:
            kind, channel, size = struct.unpack_from(">BHI", data, at)
            end = at + 8 + size
            if end > len(data):
                break
            self._seen.add(channel)
            if not self._swallowed(kind, channel, data[at + 7 : at + 11]):
                frames.append(data[at:end])
            at = end
        self._rest = data[at:]
        return b"".join(frames)
