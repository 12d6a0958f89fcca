"""One channel with publisher confirms, and what is unconfirmed on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pika.channel import Channel

from amqptasks.broker.pending import Pending
from amqptasks.broker.versions import fitting_priority, two_priority_levels
from amqptasks.broker.wire import EncodedProperties, encode_properties

__all__ = ["Flight"]

#: Around a content header's properties: the frame (8) and class, weight and body size (12).
_HEADER_FRAME = 20
_FRAME_MAX = 131_072


class Flight:
    """Delivery tags and the messages that they stand for. Tags count from 1 on each channel (basic.ack)."""

    __slots__ = ("alone", "channel", "room", "tag", "two_levels", "unconfirmed")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.tag = 0
        #: In the order in which they were sent.
        self.unconfirmed: dict[int, Pending] = {}
        #: A suspect is on its way, and nothing may go beside it.
        self.alone = False
        #: Bytes that a message's properties may have: they must fit one frame.
        self.room = (channel.connection.params.frame_max or _FRAME_MAX) - _HEADER_FRAME
        self.two_levels = two_priority_levels(channel.connection.server_properties)

    def properties(self, pending: Pending) -> EncodedProperties:
        """The message's properties, as this broker's version wants them."""
        envelope = pending.envelope
        if self.two_levels and fitting_priority(envelope) != envelope.priority:
            return encode_properties(replace(envelope, priority=fitting_priority(envelope)))
        return pending.properties

    def settled(self, method: Any) -> list[Pending]:
        """Take the messages that a basic.ack or basic.nack is about."""
        unconfirmed, tag = self.unconfirmed, method.delivery_tag
        if not method.multiple:
            pending = unconfirmed.pop(tag, None)
            return [] if pending is None else [pending]
        tags = []
        for one in unconfirmed:
            if one > tag:
                break
            tags.append(one)
        return [unconfirmed.pop(one) for one in tags]

    def returned(self, method: Any, properties: Any) -> None:
        """Note a basic.return. It comes before the ack of its message.

        It carries no tag: of several messages with one id it is about the earliest that was not returned yet.
        """
        for pending in self.unconfirmed.values():
            envelope = pending.envelope
            if (
                pending.returned is None
                and envelope.correlation_id == properties.correlation_id
                and envelope.message_id == properties.message_id
                and envelope.routing_key == method.routing_key
                and envelope.exchange == method.exchange
            ):
                pending.returned = str(method.reply_text)
                return
