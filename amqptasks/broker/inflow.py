"""Reading what a broker sends, fast.

Nearly all that is read is deliveries and confirms. pika copies the rest of its buffer for each frame, makes three
objects of a message's three frames and looks each up among its callbacks; here they are read where they lie. Every
other frame is pika's, and so is a message whose body comes in several frames (AMQP 0-9-1, 4.2.6: content framing).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from pika import spec
from pika.spec import BasicProperties

from amqptasks.broker.wire import decode_properties, text

__all__ = ["Inflow", "Properties", "Take"]

#: Called with delivery tag, redelivered, exchange, routing key, properties and body.
Take = Callable[[int, bool, Any, Any, Any, bytes], None]

# Type, channel, size of the payload; one byte ends a frame.
_FRAME = struct.Struct(">BHI")
_HEAD, _END = _FRAME.size, spec.FRAME_END
_METHOD, _HEADER, _BODY = spec.FRAME_METHOD, spec.FRAME_HEADER, spec.FRAME_BODY
_DELIVER = spec.Basic.Deliver.INDEX.to_bytes(4, "big")
_ACK = spec.Basic.Ack.INDEX.to_bytes(4, "big")
_TAG = struct.Struct(">Q?")
# Of a content header: class, weight, size of the body.
_CONTENT = struct.Struct(">HHQ")
_PIKAS, _PARTIAL = -1, 0
_MOST_NAMES = 1000


class Properties(BasicProperties):  # type: ignore[misc]  # pika's modules are untyped here
    """Properties that are made and decoded fast, and never raise.

    Half of what a leader did was reading header tables. And pika raises for a header that it cannot turn into a Python
    value (a time beyond the year 9999, an unknown field type), in the middle of reading the socket: one message would
    end the leader, come back, and end the next. Without its headers it is undecodable like any other bad message.
    """

    content_type = content_encoding = headers = delivery_mode = priority = correlation_id = reply_to = None
    expiration = message_id = timestamp = type = user_id = app_id = cluster_id = None

    def __init__(self) -> None:
        """Nothing is set: the class says None."""

    def decode(self, encoded: bytes, offset: int = 0) -> BasicProperties:
        try:
            decode_properties(self, encoded, offset)
        except Exception:
            self.headers = None
        return self


# pika looks the class up here for each content header that it reads.
spec.props[BasicProperties.INDEX] = Properties


class Inflow:
    """Cuts a connection's bytes into deliveries, for those who take them, and other frames.

    Args:
        other: called with each other frame, whole.
    """

    def __init__(self, other: Callable[[bytes], None]) -> None:
        self._other = other
        self._rest = b""
        self._names: dict[bytes, str | bytes] = {}
        #: Who takes the deliveries of a consumer, by channel number and consumer tag.
        self.takers: dict[tuple[int, bytes], Take] = {}
        #: Who is told what the broker confirms, by channel number: delivery tag, multiple.
        self.confirms: dict[int, Callable[[int, bool], None]] = {}

    def feed(self, data: bytes) -> int:
        """Read on. Returns how many bytes are done with; the rest is the beginning of a frame."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at, end = 0, len(data)
        while end - at >= _HEAD:
            kind, channel, size = _FRAME.unpack_from(data, at)
            after = at + _HEAD + size + 1
            if kind == _METHOD and after <= end:
                method = data[at + _HEAD : at + _HEAD + 4]
                if method == _DELIVER:
                    done = self._delivery(data, at, after, channel)
                    if done == _PARTIAL:
                        break
                    if done != _PIKAS:
                        at = done
                        continue
                elif method == _ACK and channel in self.confirms and data[after - 1] == _END:
                    self.confirms[channel](*_TAG.unpack_from(data, at + _HEAD + 4))
                    at = after
                    continue
            elif kind > 8:  # "AMQP": the broker speaks another version, and says which in eight bytes
                after = at + 8
            if after > end:
                break
            self._other(data[at:after])
            at = after
        self._rest = data[at:]
        return at

    def forget(self, channel: int) -> None:
        """The channel is closed."""
        self.confirms.pop(channel, None)
        for key in [key for key in self.takers if key[0] == channel]:
            del self.takers[key]

    def _delivery(self, data: bytes, at: int, header: int, channel: int) -> int:
        """Hand over the message that begins at `at`. Returns where it ends, or that it is incomplete, or pika's."""
        start = at + _HEAD + 5
        offset = start + data[start - 1]
        take = self.takers.get((channel, data[start:offset]))
        if take is None:
            return _PIKAS
        end = len(data)
        if end - header < _HEAD + _CONTENT.size:
            return _PARTIAL
        kind, number, size = _FRAME.unpack_from(data, header)
        _, _, length = _CONTENT.unpack_from(data, header + _HEAD)
        body = header + _HEAD + size + 1
        done: int = body + _HEAD + length + 1 if length else body
        if kind != _HEADER or number != channel or data[header - 1] != _END:
            return _PIKAS
        if end < done:
            # A body in several frames is pika's to put together, whether the rest is there or not.
            whole = end < body + _HEAD or _FRAME.unpack_from(data, body) == (_BODY, channel, length)
            return _PARTIAL if whole or not length else _PIKAS
        if length and (_FRAME.unpack_from(data, body) != (_BODY, channel, length) or data[body - 1] != _END):
            return _PIKAS
        if data[done - 1] != _END:
            return _PIKAS
        tag, redelivered = _TAG.unpack_from(data, offset)
        offset += 10
        key = offset + data[offset - 1] + 1
        exchange = self._name(data[offset : key - 1])
        routing_key = self._name(data[key : key + data[key - 1]])
        properties = Properties().decode(data, header + _HEAD + _CONTENT.size)
        take(tag, redelivered, exchange, routing_key, properties, data[body + _HEAD : done - 1] if length else b"")
        return done

    def _name(self, raw: bytes) -> str | bytes:
        """Exchanges and routing keys repeat from message to message."""
        name = self._names.get(raw)
        if name is None:
            name = text(raw)
            if len(self._names) < _MOST_NAMES:
                self._names[raw] = name
        return name
