"""The publisher of a process: one connection, one I/O thread, any number of callers.

Callers put messages into an inbox and wait, each for its own confirm. The I/O thread takes all that is there, so that
the messages of many threads share round trips. Nothing waits beyond its deadline.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from amqptasks.broker import verdicts
from amqptasks.broker.confirms import ConfirmChannel
from amqptasks.broker.declarer import TopologyDeclarer
from amqptasks.broker.link import Link, new_loop
from amqptasks.broker.parameters import connection_parameters
from amqptasks.broker.pending import Pending
from amqptasks.broker.pending import retry_policy as policy_of
from amqptasks.broker.replies import Replies
from amqptasks.broker.wire import EncodedProperties, encode_properties
from amqptasks.config import BrokerSettings
from amqptasks.errors import PublishError, PublishTimeout, SerializationError
from amqptasks.message import Envelope
from amqptasks.protocol.signing import Keyring

__all__ = ["Publisher", "ReplyTo"]

logger = logging.getLogger(__name__)
#: After its deadline a caller gives the I/O thread so long to say what went wrong.
_LAST_WORD = 0.25
_EXIT_SECONDS = 1.0
#: Of the time to close, what the AMQP goodbye gets at least.
_GOODBYE_SECONDS = 0.3
_CHUNK = 256


class _Io:
    """The I/O thread's state: gone as a whole after a fork."""

    def __init__(self, publisher: Publisher) -> None:
        settings = publisher.settings
        self.publisher = publisher
        parameters = connection_parameters(settings, publisher.name)
        self.loop = new_loop()
        self.link = Link(self.loop, parameters)
        inbox = publisher.replies_to
        self.replies: Replies | None = None
        if inbox is not None:
            self.replies = Replies(
                self.link,
                publisher.reply_queue,
                lifetime=inbox.lifetime,
                on_reply=inbox.on_reply,
                on_gone=inbox.on_gone,
                renew=self._renew_replies,
            )
            lost = self.replies.lost
            self.link.watch(lambda _connection: None, lambda _error: lost())
        self.confirms = ConfirmChannel(
            self.link,
            window=settings.confirm_window,
            blocked_timeout=settings.blocked_timeout,
            declarer=TopologyDeclarer(self.loop, publisher.declare, publisher.knows_route),
            prepare=None if self.replies is None else self.replies.open,
        )
        self.inbox: deque[Pending] = deque()
        #: Reply queues that were left: a call that is on its way from its thread may still name one.
        self._left_queues: list[str] = []
        self.scheduled = False
        #: Threads that are waking the loop just now.
        self._waking: set[int] = set()
        self.stopping = False
        #: Why nothing is published any more; None while the thread runs.
        self.ended: str | None = None
        self.thread = threading.Thread(target=self._run, name="amqptasks-publisher", daemon=True)

    def _renew_replies(self, why: str) -> str:
        """Have replies come to another queue, also those to messages that are not confirmed yet."""
        old, new = self.publisher.renew_reply_queue()
        self._left_queues.append(old)
        kept = {
            one.envelope.correlation_id or ""
            for one in [*self.confirms.waiting(), *list(self.inbox)]
            if one.redirect(old, new, self.publisher.keys)
        }
        if self.publisher.replies_to is not None:
            self.publisher.replies_to.on_moved(why, kept)
        return new

    def _run(self) -> None:
        why = "the publisher was closed"
        try:
            self.link.open()
            self.loop.start()
        except Exception as error:  # callers must not wait for a thread that is gone
            why = f"the publisher's thread failed: {error!r}"
            logger.exception("The publisher's thread failed; the next publish starts another")
        finally:
            self.stopping, self.ended = True, why
            # First the flag, then the inbox: who comes in between sees the flag.
            self.confirms.fail_all(why, *[self.inbox.popleft() for _ in range(len(self.inbox))])
            self.link.abandon()
            self.loop.close()

    def put(self, pending: Sequence[Pending]) -> None:
        """From any thread: publish these. One wake-up serves all that come before the loop turns."""
        self.inbox.extend(pending)
        me = threading.get_ident()
        # Is this a signal handler that interrupted its own thread here? The wake-up after the flag then comes too late.
        interrupted = me in self._waking
        if not self.scheduled or interrupted:
            self._waking.add(me)
            self.scheduled = True
            self.loop.add_callback_threadsafe(self._take)
            if not interrupted:
                self._waking.discard(me)

    def _take(self) -> None:
        # First the flag, then the inbox: what comes in between schedules another turn, and is never left behind.
        self.scheduled = False
        inbox = self.inbox
        taken = [inbox.popleft() for _ in range(len(inbox))]
        for old in self._left_queues:
            for one in taken:
                one.redirect(old, self.publisher.reply_queue, self.publisher.keys)
        if taken:
            self.confirms.submit(*taken)

    def stop(self, deadline: float) -> None:
        """From another thread: wait for the confirms, close and end the loop, by `deadline` at the latest."""
        self.stopping = True
        goodbye = max(time.monotonic(), deadline - _GOODBYE_SECONDS)

        def settle() -> None:
            if self.link.is_open and time.monotonic() < goodbye and (self.inbox or not self.confirms.idle):
                self.loop.call_later(0.01, settle)
            else:
                if self.replies is not None:
                    self.replies.delete()
                self.link.close()
                wait()

        def wait() -> None:
            if self.link.is_open and time.monotonic() < deadline:
                self.loop.call_later(0.01, wait)
            else:
                self.loop.stop()

        if self.ended is None:
            self.loop.add_callback_threadsafe(settle)
            self.thread.join(max(0.0, deadline - time.monotonic()) + 0.1)


class ReplyTo(NamedTuple):
    """Who gets the replies to this process.

    `on_reply` is called with each reply's body, `on_gone` with the reason when replies were lost, and whether none
    will ever come; `on_moved` when only replies to these tasks will come still. All on the I/O thread. `lifetime` is
    seconds for which a reply waits in its queue.
    """

    on_reply: Callable[[bytes], None]
    on_gone: Callable[[str, bool], None]
    on_moved: Callable[[str, set[str]], None]
    lifetime: float


class Publisher:
    """Publishes with confirms. Thread-safe, and safe after `os.fork`: a child starts anew.

    So it is under gunicorn, and under uWSGI with `py-call-uwsgi-fork-hooks`, without which no hook of Python's runs.

    Args:
        settings: the broker section.
        declare: declares the topology; called when something of it turns out to be missing.
        knows_route: whether exchange and routing key (None for any) belong to that topology.
        name: the connection's name in the management UI.
        replies_to: gets the replies to this process; None when nobody wants any.
        keys: sign what is published; None where nothing is signed.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        declare: Callable[[], None] | None = None,
        knows_route: Callable[[str, str | None], bool] | None = None,
        name: str = "amqptasks",
        replies_to: ReplyTo | None = None,
        keys: Keyring | None = None,
    ) -> None:
        self.settings = settings
        self.keys = keys
        self.name = f"{name}/publisher"
        self.replies_to = replies_to
        self._reply_queue: str | None = None
        self._app = name
        self.declare = declare
        self.knows_route = knows_route
        self._policy = policy_of(settings.publish_retry, None, retry=True)
        self._lock = threading.RLock()
        self._io: _Io | None = None
        self._starting = False
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
            SerializationError: a header or the address cannot be encoded.
        """
        error = self._publish([envelope], timeout, retry, retry_policy)[0]
        if error is not None:
            raise error

    def publish_many(
        self, envelopes: Sequence[Envelope], *, timeout: float | None = None, sign: bool = True
    ) -> list[PublishError | None]:
        """Publish many with one wait for all confirms. Returns None or the error, for each in order.

        The default deadline grows with their number: a slow broker is no failure while confirms come in. Copies of
        messages that others wrote are published with `sign` False: whoever signs vouches for what it says.
        """
        if timeout is None:
            timeout = self.settings.publish_timeout + len(envelopes) / 500
        return self._publish(envelopes, timeout, True, None, sign=sign)

    def _publish(
        self,
        envelopes: Sequence[Envelope],
        timeout: float | None,
        retry: bool,
        given: Mapping[str, Any] | None,
        *,
        sign: bool = True,
    ) -> list[PublishError | None]:
        policy = self._policy if retry and not given else policy_of(self.settings.publish_retry, given, retry=retry)
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

        if self.keys is not None and sign:
            for envelope in envelopes:
                self.keys.sign(envelope)
        # All are encoded before the first is sent: one that cannot be written must not leave half of them published.
        pending = [
            Pending(envelope, _encoded(envelope), finished(index), deadline=deadline, policy=policy)
            for index, envelope in enumerate(envelopes)
        ]
        io = self._running()
        for start in range(0, len(pending), _CHUNK):
            io.put(pending[start : start + _CHUNK])
        left_for_it = max(0.0, deadline - time.monotonic()) if io.ended is None else 0.0
        if not gate.acquire(timeout=left_for_it + _LAST_WORD):
            for index, one in enumerate(pending):
                if one.done is not None:
                    one.done = None
                    outcomes[index] = (
                        PublishTimeout("the broker did not answer in time", sent=one.sent)
                        if io.ended is None
                        else PublishError(f"the message was not published: {io.ended}", sent=one.sent)
                    )
        return outcomes

    @property
    def reply_queue(self) -> str:
        """The name of this process's reply queue, which exists before a message is published."""
        name = self._reply_queue
        if name is None:
            with self._lock:
                name = self._reply_queue or self._name_reply_queue()
        return name

    def _name_reply_queue(self) -> str:
        host = socket.gethostname()[:60]
        self._reply_queue = name = f"{self._app[:60]}.reply.{host}.{os.getpid()}.{uuid.uuid4().hex[:12]}"
        return name

    def renew_reply_queue(self) -> tuple[str, str]:
        """Give the reply queue another name; the old one and the new one."""
        with self._lock:
            return self.reply_queue, self._name_reply_queue()

    def on_link(self, do: Callable[[Link], object]) -> None:
        """Have the I/O thread do something with its connection, soon."""
        io = self._running()
        io.loop.add_callback_threadsafe(lambda: do(io.link))

    @property
    def replies_ready(self) -> bool:
        """Whether the reply queue exists."""
        io = self._io
        return io is not None and not io.stopping and io.replies is not None and io.replies.ready

    def _running(self) -> _Io:
        io = self._io
        if io is not None and not io.stopping:
            return io
        with self._lock:
            if self._io is None or self._io.stopping:
                if self._starting:
                    raise PublishError(
                        "called in a signal handler that interrupted the first publish of this process, before there "
                        "was a connection: publish once before, or leave it to the main program"
                    )
                self._starting = True
                try:
                    started = _Io(self)
                    started.thread.start()
                    self._io = started
                finally:
                    self._starting = False
            return self._io

    def close(self, timeout: float = _EXIT_SECONDS) -> None:
        """Wait for confirms that are due, and close the connection. The next publish opens another."""
        with self._lock:
            io, self._io = self._io, None
        if io is not None:
            io.stop(time.monotonic() + timeout)

    def _forget(self) -> None:
        """In a forked child: the connection is the parent's, and so is what waits for its confirms."""
        io, self._io = self._io, None
        self._lock = threading.RLock()
        self._starting = False
        self._reply_queue = None
        if io is not None:
            # The rest is kept, so that no collector closes descriptors whose numbers are used anew.
            _abandoned.append(io)
            io.link.abandon()


def _encoded(envelope: Envelope) -> EncodedProperties:
    if len(envelope.exchange) + len(envelope.routing_key) > _SHORT and (problem := verdicts.too_long(envelope)):
        raise SerializationError(problem)
    return encode_properties(envelope)


#: So many characters have at most 255 bytes.
_SHORT = 63
_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()
_abandoned: list[_Io] = []


def _after_fork_in_child() -> None:
    for publisher in list(_publishers):
        publisher._forget()


def _at_exit() -> None:
    deadline = time.monotonic() + _EXIT_SECONDS
    for publisher in list(_publishers):
        with contextlib.suppress(Exception):  # nothing to tell anybody any more
            publisher.close(max(0.0, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
