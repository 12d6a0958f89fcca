"""Consuming one queue with manual acks, on a connection that may come and go.

Delivery tags belong to the channel they came from (AMQP 0-9-1, basic.ack). Each channel is an *epoch* here; what is
settled for an epoch that has passed is dropped, never sent on another channel, where it would close it (406).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pika
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker, ChannelWrongStateError, ConnectionWrongStateError
from pika.spec import BasicProperties

from amqptasks.broker.inflow import Take

__all__ = ["Consumer", "Incoming", "cancel"]

_NOT_FOUND = 404


class Incoming:
    """One message from the broker."""

    __slots__ = ("body", "epoch", "exchange", "properties", "redelivered", "routing_key", "tag")

    def __init__(
        self,
        epoch: int,
        tag: int,
        redelivered: bool,
        exchange: str,
        routing_key: str,
        properties: BasicProperties,
        body: bytes,
    ) -> None:
        self.epoch = epoch
        self.tag = tag
        self.redelivered = redelivered
        self.exchange = exchange
        self.routing_key = routing_key
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
        arguments: asked for the arguments of each basic.consume.
    """

    def __init__(
        self,
        queue: str,
        prefetch: int,
        *,
        on_message: Callable[[Incoming], None],
        on_ready: Callable[[], None],
        on_lost: Callable[[str, bool], None],
        arguments: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._arguments = arguments
        self.queue = queue
        self.prefetch = prefetch
        self.epoch = 0
        #: How many messages have come.
        self.seen = 0
        self._on_message = on_message
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._channel: Any = None
        self._consumer_tag: str | None = None
        #: The consumer that the broker is asked for, and has not confirmed yet.
        self._asked: str | None = None
        #: Called when what was cancelled is cancelled, or its channel is gone.
        self._leaving: list[Callable[[], None]] = []
        self._generation = 0
        self._opening = False
        self._stopping = False
        #: Whether the broker has cancelled it, and whatever queue has its name now was not missing since.
        self._cancelled_once = False
        #: Whether it was paused here, and does not go on yet.
        self.paused = False

    @property
    def consuming(self) -> bool:
        """Whether the broker has confirmed the consumer, and has not cancelled it."""
        return self._consumer_tag is not None

    @property
    def asking(self) -> bool:
        """Whether the broker owes an answer: to channel.open, or to a subscription."""
        return self._opening or self._asked is not None

    @property
    def is_open(self) -> bool:
        """Whether there is a channel, or one is being opened."""
        return self._channel is not None or self._opening

    def returns(self) -> bool:
        """Whether it was cancelled by the broker, and has not been asked this since."""
        cancelled, self._cancelled_once = self._cancelled_once, False
        return cancelled

    def open(self, connection: pika.connection.Connection) -> None:
        """Consume on a channel of this connection, unless one is open or being opened."""
        if not self._stopping and not self.is_open and connection.is_open:
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
        if self._channel is not None and self._consumer_tag is not None and self._asked is None:
            self._consume(self._channel, replaces=self._consumer_tag)

    def resume(self) -> None:
        """Consume again after `pause`."""
        if self._channel is not None and self._consumer_tag is None and self._asked is None:
            self._consume(self._channel, replaces=None)

    def stop(self, then: Callable[[], None]) -> None:
        """`pause`, for good."""
        self._stopping = True
        self.pause(then)

    def pause(self, then: Callable[[], None]) -> None:
        """Cancel the consumer, be it confirmed or only asked for; call `then` when no further message will come."""
        channel, known, sent = self._channel, (self._consumer_tag, self._asked), []
        self._consumer_tag = self._asked = None
        self.paused = known != (None, None) and not self._stopping
        if channel is not None and channel.is_open:
            takers, number = channel.connection.inflow.takers, channel.channel_number
            # One that is not sent yet never will be.
            sent = [tag for tag in known if tag is not None and (number, tag.encode()) in takers]
        if channel is None or not sent:
            then()
            return
        self._leaving.append(then)
        *others, last = sent
        for tag in others:
            cancel(channel, tag, lambda: None)
        cancel(channel, last, lambda: self._left(then))

    def _left(self, then: Callable[[], None]) -> None:
        if then in self._leaving:
            self._leaving.remove(then)
            then()

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
        if self._stopping:
            channel.close()
            return
        self.epoch += 1
        self._channel = channel
        channel.add_on_close_callback(self._closed)
        channel.add_on_cancel_callback(lambda _frame: self._cancelled(channel))
        self._consume(channel, replaces=None)

    def _consume(self, channel: Channel, *, replaces: str | None) -> None:
        if self._stopping or not channel.is_open:
            return
        epoch, on_message, prefetch = self.epoch, self._on_message, self.prefetch
        self._generation += 1
        self._asked = tag = f"{self.queue}.{epoch}.{self._generation}"

        def take(tag: int, again: bool, exchange: str, key: str, properties: BasicProperties, body: bytes) -> None:
            self.seen += 1
            on_message(Incoming(epoch, tag, again, exchange, key, properties, body))

        def subscribe(_frame: object) -> None:
            if self._asked == tag and channel.is_open:
                consume(channel, self.queue, take, tag, self._arguments(), consuming)

        def consuming(_frame: object) -> None:
            if self._asked != tag:
                return  # paused meanwhile: it is cancelled
            self._asked, self._consumer_tag = None, tag
            self.paused = False
            if replaces is None:
                self._on_ready()
            elif channel.is_open:
                cancel(channel, replaces, lambda: None)
            if self.prefetch != prefetch and self._asked is None and self._consumer_tag == tag:
                self._consume(channel, replaces=tag)  # changed meanwhile

        channel.basic_qos(prefetch_count=prefetch, callback=subscribe)

    def _cancelled(self, channel: Channel) -> None:
        # The queue was deleted, moved, or (4.3) a delivery timed out. Running tasks go on; a new channel shows which.
        if channel is self._channel and channel.is_open and not self._stopping:
            self._cancelled_once = True
            channel.close(reply_text="consumer cancelled by the broker")

    def _closed(self, channel: Channel, reason: Exception) -> None:
        channel.connection.inflow.forget(channel.channel_number)
        if channel is not self._channel:
            return
        missing = isinstance(reason, ChannelClosedByBroker) and reason.reply_code == _NOT_FOUND
        self._lost(str(getattr(reason, "reply_text", reason)), missing=missing)

    def _lost(self, reason: str, *, missing: bool) -> None:
        self.epoch += 1
        self._channel = None
        self._consumer_tag = self._asked = None
        self.paused = False
        self._cancelled_once = self._cancelled_once and not missing
        leaving, self._leaving = self._leaving, []
        if not self._stopping:
            self._on_lost(reason, missing)
        for then in leaving:
            then()


def consume(
    channel: Channel, queue: str, take: Take, tag: str, arguments: dict[str, Any], then: Callable[[object], None]
) -> None:
    """basic.consume on a link's channel; `then` is called with the broker's consume-ok."""

    def message(_channel: object, method: Any, properties: Any, body: bytes) -> None:
        take(method.delivery_tag, method.redelivered, method.exchange, method.routing_key, properties, body)

    channel.connection.inflow.takers[channel.channel_number, tag.encode()] = take
    channel.basic_consume(queue, message, consumer_tag=tag, arguments=arguments, callback=then)


def cancel(channel: Channel, tag: str, then: Callable[[], None]) -> None:
    """basic.cancel, without losing sight of what is on its way.

    After a cancel pika rejects by itself what the broker had sent before it saw the cancel. A reject counts as a failed
    delivery (RabbitMQ 4.3), and leaves a hole in the tags. These messages are as good as any other: they are taken.
    """

    def cancelled(_frame: object) -> None:
        channel.connection.inflow.takers.pop((channel.channel_number, tag.encode()), None)
        then()

    channel.basic_cancel(tag, callback=cancelled)
    channel._cancelled.discard(tag)
