"""A connection that comes back: one pika connection at a time on an I/O loop, over a list of nodes, with back-off."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowAborted
from pika.adapters.utils.io_services_utils import _AsyncPlaintextTransport
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.exceptions import AMQPConnectionError
from pika.frame import decode_frame

from amqptasks.broker.failures import translate
from amqptasks.broker.inflow import Inflow
from amqptasks.broker.parameters import node_name
from amqptasks.errors import BrokerError, BrokerUnreachable

__all__ = ["Link", "new_loop"]

_PAUSE_FIRST, _PAUSE_MAX = 0.1, 5.0
_STABLE_SECONDS = 60.0
# A batch of messages.
_READ_BYTES = 1 << 16


def new_loop() -> IOLoop:
    """An I/O loop for links."""
    loop = IOLoop()
    # Held for each wake-up: a signal handler that publishes would wait for ever for the call that it interrupted.
    loop._poller._waking_mutex = threading.RLock()
    return loop


class _Services(SelectorIOServicesAdapter):  # type: ignore[misc]  # pika's modules are untyped here
    """pika's access to the loop; remembers the socket that is connecting, for `Link.abandon`."""

    connecting: socket.socket | None = None

    def connect_socket(self, sock: socket.socket, resolved_addr: Any, on_done: Any) -> Any:
        self.connecting = sock
        return super().connect_socket(sock, resolved_addr, on_done)

    def create_streaming_connection(self, *, on_done: Callable[[object], None], **named: Any) -> Any:
        """As pika's, but a connection that was made and reset at once (a broker that starts, a load balancer) is an
        attempt that failed: pika 1.4.4 raises ValueError through the loop, and the leader ended."""
        try:
            return super().create_streaming_connection(on_done=on_done, **named)
        except (OSError, ValueError) as error:
            failed = ConnectionResetError(str(error))
            return self.call_later(0, lambda: on_done(failed))


class _Connection(pika.SelectConnection):  # type: ignore[misc]  # pika's modules are untyped here
    """pika's connection; it reads fast, can be closed while it connects, and be dropped without a goodbye.

    pika 1.4.4 reports a close while connecting as an abort, takes the abort (a class, no instance) for a success, and
    ends the loop with an AssertionError.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._transport: Any
        self._direct = False
        self.inflow = Inflow(self._other_frame)
        super().__init__(*arguments, **options)

    def _on_data_available(self, data_in: bytes) -> None:
        self.bytes_received += self.inflow.feed(data_in)

    def opened(self) -> None:
        """Read more at a time, where pika asks the socket for 4 KiB until there is nothing; write at once."""
        self._transport._MAX_RECV_BYTES = _READ_BYTES
        if type(self._transport) is _AsyncPlaintextTransport:  # with TLS there may be more than the socket tells
            self._transport._MAX_CONSUME_BYTES = 1
            self._direct = True

    def _output_marshaled_frames(self, marshaled_frames: Sequence[bytes]) -> None:
        data = b"".join(marshaled_frames)
        self.bytes_sent += len(data)
        self.frames_sent += len(marshaled_frames)
        transport = self._transport
        if self._direct and transport._state == transport._STATE_ACTIVE and not transport.get_write_buffer_size():
            # pika asks first whether the socket can be written to: three system calls more.
            with contextlib.suppress(OSError):  # it is full; or broken, which the transport is told in its turn
                data = data[transport._sock.send(data) :]
        if data:
            self._adapter_emit_data(data)

    def _other_frame(self, frame: bytes) -> None:
        _, decoded = decode_frame(frame)
        self._process_frame(decoded)

    def _on_connection_workflow_done(self, conn_or_exc: Any) -> None:
        if conn_or_exc is AMQPConnectionWorkflowAborted or isinstance(conn_or_exc, AMQPConnectionWorkflowAborted):
            self._transport = None
            self._handle_connection_workflow_failure(None)
        else:
            super()._on_connection_workflow_done(conn_or_exc)

    def drop(self, reason: str) -> None:
        """End the connection as a missed heartbeat does: nobody answers, so nobody is asked."""
        self._terminate_stream(AMQPConnectionError(reason))


class Link:
    """Keeps a connection open. All methods but `abandon` belong to the loop's thread.

    `on_up(connection)` is called when a connection is open; `on_down(error)` when one is lost or an attempt failed,
    with None after `close`. Nodes are tried in a random order, one after the other, before a pause; pauses grow with
    full jitter up to 5 s and start anew after a minute of stability.
    """

    def __init__(self, loop: IOLoop, parameters: list[pika.ConnectionParameters]) -> None:
        self.loop = loop
        self._services = _Services(loop)
        self._nodes = random.sample(parameters, len(parameters))
        self._node = 0
        self._failures = 0
        self._failed_at = 0.0
        self._connection: _Connection | None = None
        self._timer: Any = None
        self._due = 0.0
        self._up_at = 0.0
        self._wanted = False
        self._watchers: list[tuple[Callable[[Any], None], Callable[[BrokerError | None], None]]] = []
        #: `time.monotonic` of the broker's connection.blocked; None while it takes messages.
        self.blocked_since: float | None = None
        self.on_blocked: Callable[[], None] = lambda: None
        self.on_unblocked: Callable[[], None] = lambda: None

    def watch(self, on_up: Callable[[Any], None], on_down: Callable[[BrokerError | None], None]) -> None:
        """Call these when the connection comes and goes."""
        self._watchers.append((on_up, on_down))

    @property
    def is_open(self) -> bool:
        """Whether a connection exists, be it open, opening or closing."""
        return self._connection is not None

    @property
    def connection(self) -> Any:
        """The connection, be it open, opening or closing; None while there is none."""
        return self._connection

    @property
    def unsent(self) -> int:
        """Bytes that wait in this process for the broker to take them."""
        return self._connection._get_write_buffer_size() if self._connection is not None else 0

    @property
    def round_over(self) -> bool:
        """Whether every node was tried since the last pause."""
        return self._failures % len(self._nodes) == 0

    @property
    def node(self) -> str:
        """The node that is connected, or tried next, as ``host:port/vhost``."""
        return node_name(self._nodes[self._node])

    def open(self) -> None:
        """Connect, and keep connected until `close`."""
        self._wanted = True
        if self._connection is None and self._timer is None:
            self._connect()

    def connect_within(self, seconds: float) -> None:
        """Somebody wants to publish: shorten the pause that is on, if there is one, to this.

        Never to less than the first pause after a failure, however many ask: a broker that starts is not helped by a
        thousand attempts a second.
        """
        if self._timer is None:
            return
        now = time.monotonic()
        due = max(now + seconds, self._failed_at + _PAUSE_FIRST)
        if due < self._due:
            self.loop.remove_timeout(self._timer)
            self._connect_at(now, due)

    def close(self) -> None:
        """Close the connection and stay closed."""
        self._wanted = False
        if self._timer is not None:
            self.loop.remove_timeout(self._timer)
            self._timer = None
        connection = self._connection
        if connection is not None and not (connection.is_closing or connection.is_closed):
            connection.close()

    def give_up(self, reason: str) -> None:
        """The node is silent: drop the connection, and go on with the next node."""
        if self._connection is not None and not self._connection.is_closed:
            self._connection.drop(reason)

    def abandon(self) -> None:
        """Close the socket as a Python object, from any thread, when the loop will not turn again.

        So in a forked child, where the connection is the parent's: no AMQP goodbye, no TLS goodbye, nothing asked of
        the loop, whose epoll instance is the parent's too.
        """
        connected = getattr(getattr(self._connection, "_transport", None), "_sock", None)
        for inherited in (connected, self._services.connecting):
            if inherited is not None:
                with contextlib.suppress(OSError):
                    inherited.close()

    # -- attempts -------------------------------------------------------------------------------------------------

    def _connect_at(self, now: float, due: float) -> None:
        self._due = due
        self._timer = self.loop.call_later(max(0.0, due - now), self._connect)

    def _connect(self) -> None:
        self._timer = None
        parameters = self._nodes[self._node]
        try:
            self._connection = _Connection(
                parameters,
                on_open_callback=self._opened,
                on_open_error_callback=lambda connection, error: self._lost(connection, error, parameters),
                on_close_callback=lambda connection, error: self._lost(connection, error, parameters),
                custom_ioloop=self._services,
            )
        except Exception as error:  # an address that cannot even be tried
            self._again(translate(error, parameters))

    def _opened(self, connection: _Connection) -> None:
        if not self._wanted:
            connection.close()
            return
        self._up_at = time.monotonic()
        self.blocked_since = None
        connection.opened()
        connection.add_on_connection_blocked_callback(self._blocked)
        connection.add_on_connection_unblocked_callback(self._unblocked)
        for on_up, _ in self._watchers:
            on_up(connection)

    def _blocked(self, _connection: object, _method: object) -> None:
        self.blocked_since = time.monotonic()
        self.on_blocked()

    def _unblocked(self, _connection: object, _method: object) -> None:
        self.blocked_since = None
        self.on_unblocked()

    def _lost(self, connection: object, error: object, parameters: pika.ConnectionParameters) -> None:
        if connection is not self._connection and self._connection is not None:
            return
        self._connection = None
        self.blocked_since = None
        if not self._wanted:
            for _, on_down in self._watchers:
                on_down(None)
            return
        if self._up_at and time.monotonic() - self._up_at > _STABLE_SECONDS:
            self._failures = 0
        self._up_at = 0.0
        self._again(translate(error, parameters))

    def _again(self, error: BrokerError) -> None:
        self._connection = None
        self._node = (self._node + 1) % len(self._nodes)
        self._failures += 1
        self._failed_at = now = time.monotonic()
        rounds = (self._failures - 1) // len(self._nodes)
        if isinstance(error, BrokerUnreachable) and not self.round_over:
            pause = 0.0  # the next node at once
        else:
            pause = random.uniform(_PAUSE_FIRST, min(_PAUSE_MAX, _PAUSE_FIRST * 2.0 ** min(rounds + 1, 10)))
        self._connect_at(now, now + pause)
        for _, on_down in self._watchers:
            on_down(error)
