"""Consuming one queue with manual acks, on a connection that may come and go.

Delivery tags belong to the channel they came from (AMQP 0-9-1, basic.ack). Each channel is an *epoch* here; what is
settled for an epoch that has passed is dropped, never sent on another channel, where it would close it (406).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika
from pika import spec
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker, ChannelWrongStateError, ConnectionWrongStateError
from pika.spec import Basic, BasicProperties

from amqptasks.broker.wire import decode_properties

__all__ = ["Consumer", "Incoming"]

_NOT_FOUND = 404


class _QuickProperties(BasicProperties):  # type: ignore[misc]  # pika's modules are untyped here
    """Properties that are decoded fast, and never raise.

    Half of what a leader does is reading header tables. And pika raises for a header that it cannot turn into a Python
    value (a time beyond the year 9999, an unknown field type), in the middle of reading the socket: one message would
    end the leader, come back, and end the next. Without its headers it is undecodable like any other bad message.
    """

    def decode(self, encoded: bytes, offset: int = 0) -> BasicProperties:
        try:
            decode_properties(self, encoded, offset)
        except Exception:
            self.headers = None
        return self


# pika looks the class up here for each content header that it reads.
spec.props[BasicProperties.INDEX] = _QuickProperties


class Incoming:
    """One message from the broker."""

    __slots__ = ("body", "epoch", "exchange", "properties", "redelivered", "routing_key", "tag")

    def __init__(self, epoch: int, method: Basic.Deliver, properties: BasicProperties, body: bytes) -> None:
        self.epoch = epoch
        self.tag: int = method.delivery_tag
        self.exchange: str = method.exchange
        self.routing_key: str = method.routing_key
        self.redelivered: bool = method.redelivered
        self.properties = properties
        self.body = body


class Consumer:
    """One queue's consumer. All methods belong to the I/O loop's thread.

    Args:
        queue: its name.
        prefetch: how many messages may be unacknowledged (basic.qos, per consumer).
        on_message: called with each `Incoming`.
        on_ready: called when the broker confirmed the consumer (basic.consume-ok).
        on_lost: called with the reason when the channel is gone and its unacknowledged messages with it;
            ``missing`` is true when the queue does not exist.
    """

    def __init__(
        self,
        queue: str,
        prefetch: int,
        *,
        on_message: Callable[[Incoming], None],
        on_ready: Callable[[], None],
        on_lost: Callable[[str, bool], None],
    ) -> None:
        self.queue = queue
        self.prefetch = prefetch
        self.epoch = 0
        self._on_message = on_message
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._channel: Any = None
        self._consumer_tag: str | None = None
        self._generation = 0
        self._opening = False
        self._stopping = False

    @property
    def consuming(self) -> bool:
        """Whether the broker has confirmed the consumer, and has not cancelled it."""
        return self._consumer_tag is not None

    @property
    def is_open(self) -> bool:
        """Whether there is a channel, or one is being opened."""
        return self._channel is not None or self._opening

    def open(self, connection: pika.connection.Connection) -> None:
        """Consume on a channel of this connection, unless one is open or being opened."""
        if not self._stopping and not self.is_open:
            self._opening = True
            connection.channel(on_open_callback=self._opened)

    def connection_lost(self, reason: str) -> None:
        """The link went down: every delivery of this epoch is the broker's again."""
        self._opening = False
        if self._channel is not None:
            self._lost(reason, missing=False)

    def set_prefetch(self, prefetch: int) -> None:
        """Change the prefetch. It applies to new consumers only, so a second one takes over from the first."""
        self.prefetch = prefetch
        if self._channel is not None and self._consumer_tag is not None and not self._stopping:
            self._consume(self._channel, replaces=self._consumer_tag)

    def resume(self) -> None:
        """Consume again after `pause`."""
        if self._channel is not None and self._channel.is_open and self._consumer_tag is None:
            self._consume(self._channel, replaces=None)

    def stop(self, then: Callable[[], None]) -> None:
        """`pause`, for good."""
        self._stopping = True
        self.pause(then)

    def pause(self, then: Callable[[], None]) -> None:
        """Cancel the consumer, and call `then` when no further message will come."""
        channel, tag = self._channel, self._consumer_tag
        self._consumer_tag = None
        if channel is None or tag is None or not channel.is_open:
            then()
            return
        _cancel(channel, tag, then)

    # -- settling -------------------------------------------------------------------------------------------------

    def send_ack(self, tag: int, epoch: int, *, multiple: bool) -> None:
        """basic.ack, if the epoch is still the channel's."""
        if epoch == self.epoch and self._channel is not None:
            self._guarded(self._channel.basic_ack, tag, multiple)

    def send_requeue(self, tag: int, epoch: int) -> None:
        """basic.nack with requeue: on RabbitMQ 4.3 it does not count as a failed delivery."""
        if epoch == self.epoch and self._channel is not None:
            self._guarded(self._channel.basic_nack, tag, False, True)

    @staticmethod
    def _guarded(method: Callable[..., None], *args: Any) -> None:
        try:
            method(*args)
        except (ChannelWrongStateError, ConnectionWrongStateError):
            return  # the channel closes at this moment: the broker gives the message out again

    # -- channel --------------------------------------------------------------------------------------------------

    def _opened(self, channel: Channel) -> None:
        self._opening = False
        self.epoch += 1
        self._channel = channel
        channel.add_on_close_callback(self._closed)
        channel.add_on_cancel_callback(lambda _frame: self._cancelled(channel))
        self._consume(channel, replaces=None)

    def _consume(self, channel: Channel, *, replaces: str | None) -> None:
        epoch = self.epoch
        self._generation += 1
        tag = f"{self.queue}.{epoch}.{self._generation}"

        def message(_channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes) -> None:
            self._on_message(Incoming(epoch, method, properties, body))

        def consuming(_frame: object) -> None:
            if self._channel is not channel or self._stopping:
                return
            self._consumer_tag = tag
            if replaces is None:
                self._on_ready()
            elif channel.is_open:
                _cancel(channel, replaces, lambda: None)

        channel.basic_qos(
            prefetch_count=self.prefetch,
            callback=lambda _frame: channel.basic_consume(self.queue, message, consumer_tag=tag, callback=consuming),
        )

    def _cancelled(self, channel: Channel) -> None:
        # The queue was deleted, moved, or (4.3) a delivery timed out. Running tasks go on; a new channel shows which.
        if channel is self._channel and channel.is_open and not self._stopping:
            channel.close(reply_text="consumer cancelled by the broker")

    def _closed(self, channel: Channel, reason: Exception) -> None:
        if channel is not self._channel:
            return
        missing = isinstance(reason, ChannelClosedByBroker) and reason.reply_code == _NOT_FOUND
        self._lost(str(getattr(reason, "reply_text", reason)), missing=missing)

    def _lost(self, reason: str, *, missing: bool) -> None:
        self.epoch += 1
        self._channel = None
        self._consumer_tag = None
        if not self._stopping:
            self._on_lost(reason, missing)


def _cancel(channel: Channel, tag: str, then: Callable[[], None]) -> None:
    """basic.cancel, without losing sight of what is on its way.

    After a cancel pika rejects by itself what the broker had sent before it saw the cancel. A reject counts as a failed
    delivery (RabbitMQ 4.3), and leaves a hole in the tags. These messages are as good as any other: they are taken.
    """
    channel.basic_cancel(tag, callback=lambda _frame: then())
    channel._cancelled.discard(tag)
