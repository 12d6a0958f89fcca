"""One channel with publisher confirms, and what is unconfirmed on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pika.channel import Channel

from amqptasks.broker.pending import Pending
from amqptasks.broker.versions import fitting_priority, two_priority_levels
from amqptasks.broker.wire import EncodedProperties, content_frames, encode_properties, publish_frame
from amqptasks.errors import Unwritable
from amqptasks.message import Envelope

__all__ = ["Flight", "Key"]

#: Exchange and routing key.
Key = tuple[str, str]
#: Around a content header's properties: the frame (8) and class, weight and body size (12).
_HEADER_FRAME = 20
_FRAME_MAX = 131_072
_MOST_ADDRESSES = 1000
#: So much is handed to the system at a time.
_BATCH_BYTES = 1 << 18


class Flight:
    """Delivery tags and the messages that they stand for. Tags count from 1 on each channel (basic.ack)."""

    __slots__ = (
        "_batch",
        "_body_max",
        "_connection",
        "_methods",
        "_number",
        "_size",
        "alone",
        "channel",
        "looked_at",
        "room",
        "tag",
        "tests",
        "two_levels",
        "unconfirmed",
    )

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.tag = 0
        #: In the order in which they were sent.
        self.unconfirmed: dict[int, Pending] = {}
        #: What was sent last when somebody looked for overdue messages last.
        self.looked_at = 0
        #: Overdue messages that were sent again on another channel, to see whether this one is deaf.
        self.tests: dict[Key, Pending] = {}
        #: A suspect is on its way, and nothing may go beside it.
        self.alone = False
        #: Bytes that a message's properties may have: they must fit one frame.
        self.room = (channel.connection.params.frame_max or _FRAME_MAX) - _HEADER_FRAME
        self._connection = channel.connection
        self._number: int = channel.channel_number
        self._body_max: int = channel.connection._body_max_length
        #: The first frame of a message, by exchange, routing key and mandatory.
        self._methods: dict[tuple[str, str, bool], bytes] = {}
        self._batch: list[bytes] = []
        self._size = 0
        self.two_levels = two_priority_levels(channel.connection.server_properties)

    def add(self, pending: Pending) -> None:
        """Put a message on its way. Raises `Unwritable` for one that cannot be; nothing of it is written."""
        envelope, properties = (
            pending.envelope,
            fitting_properties(pending.envelope, pending.properties, two_levels=self.two_levels),
        )
        if len(properties.data) > self.room:
            raise Unwritable(f"the message's headers do not fit a frame of {self.room} bytes")
        try:
            frames = self._frames(envelope, properties)
        except Exception as error:
            raise Unwritable(f"the message cannot be written: {error}") from error
        self.tag += 1
        self.unconfirmed[self.tag] = pending
        pending.sent, pending.returned = True, None
        self._batch.append(frames)
        self._size += len(frames)
        if self._size > _BATCH_BYTES:
            self.write()

    def write(self) -> None:
        """Send what was added: one piece for the system, where pika makes a system call for each frame."""
        if self._batch:
            batch, self._batch, self._size = self._batch, [], 0
            self._connection._output_marshaled_frames((b"".join(batch),))

    def _frames(self, envelope: Envelope, properties: EncodedProperties) -> bytes:
        address = (envelope.exchange, envelope.routing_key, envelope.mandatory)
        method = self._methods.get(address)
        if method is None:
            method = publish_frame(self._number, *address)
            if len(self._methods) < _MOST_ADDRESSES:
                self._methods[address] = method
        return method + content_frames(self._number, properties, envelope.body, self._body_max)

    def settled(self, tag: int, multiple: bool) -> list[Pending]:
        """Take the messages that a basic.ack or basic.nack is about."""
        unconfirmed = self.unconfirmed
        if not multiple:
            pending = unconfirmed.pop(tag, None)
            return [] if pending is None else [pending]
        tags = []
        for one in unconfirmed:
            if one > tag:
                break
            tags.append(one)
        return [unconfirmed.pop(one) for one in tags]

    def unconfirmed_keys(self, newest: int) -> dict[Key, list[int]]:
        """The tags up to `newest` whose messages still wait, by exchange and routing key."""
        waiting: dict[Key, list[int]] = {}
        for tag, pending in self.unconfirmed.items():
            if tag > newest:
                break
            if pending.done is not None:
                waiting.setdefault((pending.envelope.exchange, pending.envelope.routing_key), []).append(tag)
        return waiting

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


def fitting_properties(envelope: Envelope, properties: EncodedProperties, *, two_levels: bool) -> EncodedProperties:
    """A message's properties as this broker's version wants them: see `amqptasks.broker.versions`."""
    if two_levels and fitting_priority(envelope) != envelope.priority:
        return encode_properties(replace(envelope, priority=fitting_priority(envelope)))
    return properties
