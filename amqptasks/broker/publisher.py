"""The publisher of a process: one connection, one I/O thread, any number of callers.

Callers put messages into an inbox and wait, each for its own confirm. The I/O thread takes all that is there, so that
the messages of many threads share round trips. Nothing waits beyond its deadline.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amqptasks.broker.confirms import ConfirmChannel
from amqptasks.broker.link import Link, new_loop
from amqptasks.broker.parameters import connection_parameters
from amqptasks.broker.pending import Pending
from amqptasks.broker.pending import retry_policy as policy_of
from amqptasks.broker.wire import encode_properties
from amqptasks.config import BrokerSettings
from amqptasks.errors import PublishError, PublishTimeout
from amqptasks.message import Envelope

__all__ = ["Publisher"]

#: After its deadline a caller gives the I/O thread so long to say what went wrong.
_LAST_WORD = 0.25
_DECLARE_PAUSE = 5.0
_EXIT_SECONDS = 1.0
_CHUNK = 256


class _Io:
    """The I/O thread's state: gone as a whole after a fork."""

    def __init__(self, publisher: Publisher) -> None:
        settings = publisher.settings
        self.loop = new_loop()
        self.link = Link(self.loop, connection_parameters(settings, publisher.name))
        self.confirms = ConfirmChannel(
            self.link,
            window=settings.confirm_window,
            blocked_timeout=settings.blocked_timeout,
            declarer=publisher.declare_for,
        )
        self.inbox: deque[Pending] = deque()
        self.scheduled = False
        self.stopping = False
        self.thread = threading.Thread(target=self._run, name="amqptasks-publisher", daemon=True)

    def _run(self) -> None:
        try:
            self.link.open()
            self.loop.start()
        finally:
            self.loop.close()

    def put(self, pending: Sequence[Pending]) -> None:
        """From any thread: publish these. One wake-up serves all that come before the loop turns."""
        self.inbox.extend(pending)
        if not self.scheduled:
            self.scheduled = True
            self.loop.add_callback_threadsafe(self._take)

    def _take(self) -> None:
        # First the flag, then the inbox: what comes in between schedules another turn, and is never left behind.
        self.scheduled = False
        inbox = self.inbox
        taken = [inbox.popleft() for _ in range(len(inbox))]
        if taken:
            self.confirms.submit(*taken)

    def stop(self, deadline: float) -> None:
        """From another thread: close and end the loop, by `deadline` at the latest."""
        self.stopping = True

        def close() -> None:
            self.link.close()
            wait()

        def wait() -> None:
            if self.link.is_open and time.monotonic() < deadline:
                self.loop.call_later(0.01, wait)
            else:
                self.loop.stop()

        self.loop.add_callback_threadsafe(close)
        self.thread.join(max(0.0, deadline - time.monotonic()) + 0.1)


class Publisher:
    """Publishes with confirms. Thread-safe, and safe after `os.fork` (gunicorn, uwsgi): a child starts anew.

    Args:
        settings: the broker section.
        declare: declares the topology; called when something of it turns out to be missing.
        knows_route: whether exchange and routing key (None for any) belong to that topology.
        name: the connection's name in the management UI.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        declare: Callable[[], None] | None = None,
        knows_route: Callable[[str, str | None], bool] | None = None,
        name: str = "amqptasks",
    ) -> None:
        self.settings = settings
        self.name = f"{name}/publisher"
        self._declare = declare
        self._knows_route = knows_route
        self._declared_at: float | None = None
        self._lock = threading.Lock()
        self._io: _Io | None = None
        _publishers.add(self)

    def publish(
        self,
        envelope: Envelope,
        *,
        timeout: float | None = None,
        retry: bool = True,
        retry_policy: Mapping[str, Any] | None = None,
    ) -> None:
        """Publish one message and return after the broker's confirm.

        Args:
            timeout: seconds for all of it; `broker.publish_timeout` by default.
            retry: whether to try again after a refusal or a failed connection.
            retry_policy: ``max_retries, interval_start, interval_step, interval_max``; the settings' by default.

        Raises:
            Unroutable, Nacked, BrokerBlocked, PublishTimeout: see there.
            PublishError: no connection; its ``__cause__`` tells why (`BrokerUnreachable`, `AccessRefused`).
            SerializationError: a header cannot be encoded.
        """
        error = self._publish([envelope], timeout, retry, retry_policy)[0]
        if error is not None:
            raise error

    def publish_many(self, envelopes: Sequence[Envelope], *, timeout: float | None = None) -> list[PublishError | None]:
        """Publish many with one wait for all confirms. Returns None or the error, for each in order.

        The default deadline grows with their number: a slow broker is no failure while confirms come in.
        """
        if timeout is None:
            timeout = self.settings.publish_timeout + len(envelopes) / 500
        return self._publish(envelopes, timeout, True, None)

    def _publish(
        self,
        envelopes: Sequence[Envelope],
        timeout: float | None,
        retry: bool,
        given: Mapping[str, Any] | None,
    ) -> list[PublishError | None]:
        policy = policy_of(self.settings.publish_retry, given, retry=retry)
        deadline = time.monotonic() + (self.settings.publish_timeout if timeout is None else timeout)
        outcomes: list[PublishError | None] = [None] * len(envelopes)
        left = len(envelopes)
        if not left:
            return outcomes
        gate = threading.Lock()
        gate.acquire()

        def finished(index: int) -> Callable[[PublishError | None], None]:
            def done(error: PublishError | None) -> None:
                nonlocal left
                outcomes[index] = error
                left -= 1
                if left == 0:
                    gate.release()

            return done

        # All are encoded before the first is sent: one that cannot be written must not leave half of them published.
        pending = [
            Pending(envelope, encode_properties(envelope), finished(index), deadline=deadline, policy=policy)
            for index, envelope in enumerate(envelopes)
        ]
        io = self._running()
        for start in range(0, len(pending), _CHUNK):
            io.put(pending[start : start + _CHUNK])
        if not gate.acquire(timeout=max(0.0, deadline - time.monotonic()) + _LAST_WORD):
            for index, one in enumerate(pending):
                if one.done is not None:
                    one.done = None
                    outcomes[index] = PublishTimeout("the broker did not answer in time", sent=one.sent)
        return outcomes

    def _running(self) -> _Io:
        io = self._io
        if io is not None and not io.stopping:
            return io
        with self._lock:
            if self._io is None or self._io.stopping:
                self._io = _Io(self)
                self._io.thread.start()
            return self._io

    def declare_for(self, exchange: str, routing_key: str | None) -> bool:
        """On the I/O thread: declare the topology when the route belongs to it, at most every 5 s."""
        if self._declare is None or self._knows_route is None or not self._knows_route(exchange, routing_key):
            return False
        now = time.monotonic()
        if self._declared_at is None or now - self._declared_at > _DECLARE_PAUSE:
            self._declare()
            self._declared_at = time.monotonic()
        return True

    def close(self, timeout: float = _EXIT_SECONDS) -> None:
        """Close the connection. The next publish opens another."""
        with self._lock:
            io, self._io = self._io, None
        if io is not None:
            io.stop(time.monotonic() + timeout)

    def _forget(self) -> None:
        """In a forked child: the connection is the parent's."""
        io, self._io = self._io, None
        self._lock = threading.Lock()
        if io is None:
            return
        # Closed as a Python object: no AMQP goodbye, no TLS goodbye, nothing that the parent's broker would see. The
        # rest is kept, so that no collector closes descriptors whose numbers are used anew.
        _abandoned.append(io)
        connection = getattr(io.link, "_connection", None)
        transport = getattr(connection, "_transport", None)
        inherited = getattr(transport, "_sock", None)
        if inherited is not None:
            with contextlib.suppress(OSError):
                inherited.close()


_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()
_abandoned: list[_Io] = []


def _after_fork_in_child() -> None:
    for publisher in list(_publishers):
        publisher._forget()


def _at_exit() -> None:
    for publisher in list(_publishers):
        publisher.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
