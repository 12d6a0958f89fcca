"""Consuming a queue, and publishing and acknowledging in one transaction on the same channel.

What RabbitMQ promises of ``tx.commit`` is little in general: its effects on several queues are not atomic when the
*broker* fails in between (RabbitMQ, "Broker Semantics"). What it does promise is exactly what fencing needs. Publishes
and acks reach the queues only with the commit, which is one frame and is carried out by the channel's process in one
go: a *client* that dies, is stopped or is cut off has committed all of it or nothing, and a client whose channel the
broker has closed commits nothing ever after, whatever it believes to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker, ChannelWrongStateError, ConnectionWrongStateError

from amqptasks.broker.consumer import Consumer, Incoming
from amqptasks.broker.wire import encode_properties
from amqptasks.message import Envelope

__all__ = ["TransactionalConsumer"]


class TransactionalConsumer(Consumer):
    """A consumer whose channel is transactional. One commit at a time.

    Never `stop` it while it holds messages: a cancelled consumer is no longer the active one, but its messages are not
    given to the next before the channel is closed. Close the connection instead.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._returned: list[str] = []
        #: Whether the broker has closed the last channel for something that it was asked to do.
        self.refused = False

    def commit(
        self, envelopes: Sequence[Envelope], acks: Sequence[Incoming], done: Callable[[list[str]], None]
    ) -> None:
        """Publish these and acknowledge those, all or nothing; then `done` is called with the correlation ids of
        messages that no queue took. When the channel is lost before, it is not called, and ``on_lost`` is.

        A queue that refuses a message closes the channel, and only that message is not there. Raises
        `SerializationError`, with nothing done.
        """
        encoded = [(envelope, encode_properties(envelope)) for envelope in envelopes]
        channel = self._channel
        self._returned = []
        try:
            for envelope, properties in encoded:
                channel.basic_publish(
                    envelope.exchange, envelope.routing_key, envelope.body, properties, envelope.mandatory
                )
            for incoming in acks:
                self.send_ack(incoming.tag, incoming.epoch, multiple=False)
            channel.tx_commit(callback=lambda _frame: self._committed(channel, done))
        except (AttributeError, ChannelWrongStateError, ConnectionWrongStateError):
            if channel is not None:
                return  # it closes at this moment: `on_lost` follows
            raise

    def _closed(self, channel: Channel, reason: Exception) -> None:
        self.refused = isinstance(reason, ChannelClosedByBroker)
        super()._closed(channel, reason)

    def _opened(self, channel: Channel) -> None:
        self.refused = False
        channel.add_on_return_callback(
            lambda _channel, _method, properties, _body: self._returned.append(properties.correlation_id)
        )
        super()._opened(channel)

    def _consume(self, channel: Channel, *, replaces: str | None) -> None:
        consume = super()._consume
        channel.tx_select(callback=lambda _frame: consume(channel, replaces=replaces))

    def _committed(self, channel: Channel, done: Callable[[list[str]], None]) -> None:
        if channel is self._channel:
            done(self._returned)
