"""The reply queue of a process: declared and consumed before the first message that names it is published.

One durable queue per process, which RabbitMQ deletes some minutes after the process has gone (``x-expires``), so that
it outlives a lost connection and leaves nothing behind. It is a classic queue: it belongs to one process, and a
replicated one would cost every reply a round of agreement.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from pika.channel import Channel
from pika.exceptions import (
    ChannelClosedByBroker,
    ChannelClosedByClient,
    ChannelWrongStateError,
    ConnectionWrongStateError,
)

from amqptasks.broker.link import Link

__all__ = ["EXPIRES_SECONDS", "Replies"]

logger = logging.getLogger(__name__)
#: How long the queue outlives its process, and a lost connection may last before replies are lost.
EXPIRES_SECONDS = 300
#: A caller that does not keep up loses its oldest replies before the broker runs out of memory.
_MAX_BYTES = 256 * 1024 * 1024
_PREFETCH = 2000
_ACK_EVERY = 200
_ACK_SECONDS = 0.05
_REOPEN_SECONDS = 1.0
#: So long may the broker think about a queue that it has had: 4.3 thinks for 64 s about one whose node is down.
_ANSWER_SECONDS = 5.0
#: AMQP 0-9-1, reply code "not-found".
_NOT_FOUND = 404


class Replies:
    """Consumes one process's reply queue. All methods belong to the I/O loop's thread.

    Args:
        queue: its name.
        on_reply: called with the body of each reply.
        on_gone: called with the reason when replies may have been lost, or cannot come.
        renew: called when the node of the queue is down; gives another name.
    """

    def __init__(
        self,
        link: Link,
        queue: str,
        *,
        lifetime: float,
        on_reply: Callable[[bytes], None],
        on_gone: Callable[[str, bool], None],
        renew: Callable[[str], str],
    ) -> None:
        self._link = link
        self._queue = queue
        self._arguments = {
            "x-queue-type": "classic",
            "x-expires": EXPIRES_SECONDS * 1000,
            "x-message-ttl": max(1, int(min(lifetime, 10 * 365 * 86400) * 1000)),
            "x-max-length-bytes": _MAX_BYTES,
        }
        self._on_reply = on_reply
        self._on_gone = on_gone
        self._renew = renew
        self._channel: Any = None
        #: The channel on which the broker has not answered yet.
        self._waiting: Any = None
        self._then: Callable[[], None] | None = None
        self._unacked = 0
        self._tag = 0
        self._flush_planned = False
        self._left_at: float | None = None
        #: Whether the broker has confirmed the consumer once: from then on the queue exists.
        self.ready = False

    def open(self, connection: Any, then: Callable[[], None]) -> None:
        """Declare and consume on this connection; `then` is called when that is done, or cannot be."""
        self._then = then
        connection.channel(on_open_callback=self._opened)

    def lost(self) -> None:
        """The connection is gone."""
        if self._left_at is None:
            self._left_at = time.monotonic()
        self._channel, self._then = None, None

    def delete(self) -> None:
        """The process ends: the queue need not wait for its expiry."""
        channel, self._channel = self._channel, None
        if channel is not None and channel.is_open:
            channel.queue_delete(self._queue)

    def _opened(self, channel: Channel) -> None:
        self._channel = channel
        self._unacked = 0
        channel.add_on_close_callback(self._closed)
        channel.add_on_cancel_callback(lambda _frame: channel.is_open and channel.close(0, "it was deleted"))
        channel.basic_qos(prefetch_count=_PREFETCH)
        channel.queue_declare(self._queue, durable=True, arguments=self._arguments, callback=lambda _frame: None)
        channel.basic_consume(self._queue, self._message, callback=lambda _frame: self._consuming(channel))
        if self.ready:
            self._waiting = channel
            self._link.loop.call_later(_ANSWER_SECONDS, lambda: self._overdue(channel))

    def _overdue(self, channel: Channel) -> None:
        if channel is not self._channel or channel is not self._waiting:
            return
        if self._link.blocked_since is not None:
            self._link.loop.call_later(_ANSWER_SECONDS, lambda: self._overdue(channel))
            return
        self._move(f"the broker did not answer for the reply queue in {_ANSWER_SECONDS:g} s; is a node down?")

    def _move(self, why: str) -> None:
        """In a cluster the one node that holds the queue is down: here another queue can be made."""
        self._channel = self._waiting = None
        self._queue = self._renew(why)
        connection, then = self._link.connection, self._then
        if connection is not None and connection.is_open:
            self.open(connection, then or (lambda: None))

    def _consuming(self, channel: Channel) -> None:
        if channel is not self._channel:
            return
        self._waiting = None
        left, self._left_at = self._left_at, None
        if left is not None and time.monotonic() - left > EXPIRES_SECONDS * 0.9:
            self._on_gone("the broker was away for so long that the reply queue expired", False)
        self.ready = True
        self._go_on()

    def _closed(self, channel: Channel, reason: Exception) -> None:
        if channel is not self._channel:
            return
        if not isinstance(reason, ChannelClosedByBroker | ChannelClosedByClient):
            self.lost()  # with the connection: the queue outlives it
            return
        self._channel = None
        text = str(getattr(reason, "reply_text", reason))
        if self.ready and getattr(reason, "reply_code", 0) == _NOT_FOUND:
            self._move(f"the node with the reply queue is down: {text}")
            return
        if self.ready:
            # Deleted by somebody: what was in it is gone.
            self._on_gone(f"the reply queue was closed: {text}", False)
            self._link.loop.call_later(_REOPEN_SECONDS, self._reopen)
        else:
            self._on_gone(f"the reply queue cannot be used: {text}", True)
        self._go_on()

    def _reopen(self) -> None:
        connection = self._link.connection
        if connection is not None and connection.is_open and self._channel is None and self.ready:
            self.open(connection, lambda: None)

    def _go_on(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then()

    def _message(self, channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        try:
            self._on_reply(body)
        except Exception:  # what is no result must not end the thread that publishes
            logger.exception("A message in the reply queue is no result; dropped")
        if channel is not self._channel:
            # The queue before a move, whose node answered late after all. Tags count anew on each channel.
            channel.basic_ack(method.delivery_tag)
            return
        self._tag = method.delivery_tag
        self._unacked += 1
        if self._unacked >= _ACK_EVERY:
            self._flush()
        elif not self._flush_planned:
            self._flush_planned = True
            self._link.loop.call_later(_ACK_SECONDS, self._flush_later)

    def _flush_later(self) -> None:
        self._flush_planned = False
        self._flush()

    def _flush(self) -> None:
        channel = self._channel
        if self._unacked and channel is not None:
            self._unacked = 0
            try:
                channel.basic_ack(self._tag, True)
            except (ChannelWrongStateError, ConnectionWrongStateError):
                return  # closing: what is delivered again is known already
