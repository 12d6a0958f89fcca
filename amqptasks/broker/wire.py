"""Content headers of AMQP 0-9-1, encoded and decoded fast.

pika encodes a message's header table when it sends it, on the I/O thread, and knows no floating-point field. Here it
happens in the caller, where an error belongs, in about half the time, and Celery's time limits (floats) pass.
"""

from __future__ import annotations

import struct
from datetime import datetime
from decimal import Decimal
from typing import Any

from pika import data as pika_data

from amqptasks.errors import SerializationError
from amqptasks.message import Envelope, Provenance

__all__ = [
    "EncodedProperties",
    "content_frames",
    "decode_properties",
    "decode_provenance",
    "encode_properties",
    "encode_table",
    "forwarded",
    "publish_frame",
    "text",
]

_LONG_LONG = struct.Struct(">cq")
_INT = struct.Struct(">ci")
_DOUBLE = struct.Struct(">cd")
_LENGTH = struct.Struct(">I")
_LONG_STRING = struct.Struct(">cI")
_SHORTEST, _LONGEST = -(2**31), 2**31 - 1
_LEAST, _MOST = -(2**63), 2**63 - 1

# Bits of the property flags (AMQP 0-9-1, class basic).
_CONTENT_TYPE, _CONTENT_ENCODING, _HEADERS, _DELIVERY_MODE = 1 << 15, 1 << 14, 1 << 13, 1 << 12
_PRIORITY, _CORRELATION_ID, _REPLY_TO, _EXPIRATION, _MESSAGE_ID = 1 << 11, 1 << 10, 1 << 9, 1 << 8, 1 << 7
_TIMESTAMP, _TYPE, _USER_ID, _APP_ID = 1 << 6, 1 << 5, 1 << 4, 1 << 3


# Frames (AMQP 0-9-1, 2.3.5): type, channel, size of the payload; then the payload, and one byte that ends it.
_FRAME = struct.Struct(">BHI")
#: The same with a content header's class, weight and size of the body.
_HEADER_FRAME = struct.Struct(">BHIHHQ")
_METHOD, _HEADER, _BODY, _END = 1, 2, 3, b"\xce"
_CLASS_BASIC, _PUBLISH = 60, b"\x00\x3c\x00\x28\x00\x00"


class EncodedProperties:
    """Properties as pika's frames want them: an object with `INDEX` and `encode()`."""

    INDEX = 60  # class basic
    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def encode(self) -> list[bytes]:
        """The encoded properties, in one piece."""
        return [self.data]


def publish_frame(channel: int, exchange: str, routing_key: str, mandatory: bool) -> bytes:
    """The frame of a basic.publish. Raises `SerializationError`."""
    address = _short(exchange, "exchange") + _short(routing_key, "routing key")
    payload = _PUBLISH + address + (b"\x01" if mandatory else b"\x00")
    return _FRAME.pack(_METHOD, channel, len(payload)) + payload + _END


def content_frames(channel: int, properties: EncodedProperties, body: bytes, body_max: int) -> bytes:
    """The frames of a content: its header, and the body in pieces of at most `body_max` bytes."""
    data, size = properties.data, len(body)
    head = _HEADER_FRAME.pack(_HEADER, channel, 12 + len(data), _CLASS_BASIC, 0, size)
    if size <= body_max:
        rest = (_FRAME.pack(_BODY, channel, size), body, _END) if size else ()
        return b"".join((head, data, _END, *rest))
    parts = [head, data, _END]
    for start in range(0, size, body_max):
        piece = body[start : start + body_max]
        parts += (_FRAME.pack(_BODY, channel, len(piece)), piece, _END)
    return b"".join(parts)


def _short(value: str | bytes, what: str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    if len(data) > 255:
        raise SerializationError(f"{what} has {len(data)} bytes; AMQP allows 255")
    return bytes((len(data),)) + data


def _value(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return b"S" + _LENGTH.pack(len(data)) + data
    if value is None:
        return b"V"
    if value is True or value is False:
        return b"t\x01" if value else b"t\x00"
    if isinstance(value, int):
        if _SHORTEST <= value <= _LONGEST:
            return _INT.pack(b"I", value)
        if _LEAST <= value <= _MOST:
            return _LONG_LONG.pack(b"l", value)
        raise SerializationError(f"header {name!r}: {value} does not fit 64 bits")
    if isinstance(value, float):
        return _DOUBLE.pack(b"d", value)
    if isinstance(value, dict):
        return b"F" + encode_table(value)
    if isinstance(value, list | tuple):
        items = b"".join([_value(name, item) for item in value])
        return b"A" + _LENGTH.pack(len(items)) + items
    if isinstance(value, bytes | bytearray):
        return b"x" + _LENGTH.pack(len(value)) + bytes(value)
    if isinstance(value, datetime):
        return b"T" + struct.pack(">Q", int(value.timestamp()))
    if isinstance(value, Decimal):
        return _value(name, str(value))
    raise SerializationError(
        f"header {name!r}: {type(value).__module__}.{type(value).__qualname__} cannot be an AMQP header"
    )


# Most headers of a task message have the same names each time.
_names: dict[str | bytes, bytes] = {}


def encode_table(table: dict[Any, Any]) -> bytes:
    """A field table (AMQP 0-9-1, 4.2.5.5). Raises `SerializationError` naming the header."""
    parts = []
    for name, value in table.items():
        key = _names.get(name)
        if key is None:
            key = _short(name, f"header name {name!r:.40}")
            if len(_names) < 1000:
                _names[name] = key
        parts.append(key)
        if value is None:
            parts.append(b"V")
        elif type(value) is str:
            data = value.encode("utf-8", "surrogatepass")
            parts.append(_LONG_STRING.pack(b"S", len(data)))
            parts.append(data)
        else:
            parts.append(_value(name, value))
    data = b"".join(parts)
    return _LENGTH.pack(len(data)) + data


def encode_properties(envelope: Envelope) -> EncodedProperties:
    """The envelope's properties and headers. Raises `SerializationError`."""
    flags = _DELIVERY_MODE
    parts = []
    if envelope.content_type is not None:
        flags |= _CONTENT_TYPE
        parts.append(_short(envelope.content_type, "content_type"))
    if envelope.content_encoding is not None:
        flags |= _CONTENT_ENCODING
        parts.append(_short(envelope.content_encoding, "content_encoding"))
    if envelope.headers:
        flags |= _HEADERS
        parts.append(encode_table(envelope.headers))
    parts.append(bytes((envelope.delivery_mode,)))
    if envelope.priority is not None:
        flags |= _PRIORITY
        parts.append(bytes((max(0, min(255, envelope.priority)),)))
    for bit, value, what in (
        (_CORRELATION_ID, envelope.correlation_id, "correlation_id"),
        (_REPLY_TO, envelope.reply_to, "reply_to"),
        (_EXPIRATION, envelope.expiration, "expiration"),
        (_MESSAGE_ID, envelope.message_id, "message_id"),
    ):
        if value is not None:
            flags |= bit
            parts.append(_short(value, what))
    if envelope.provenance is not None:
        flags |= _add_provenance(envelope.provenance, parts)
    return EncodedProperties(struct.pack(">H", flags) + b"".join(parts))


def _add_provenance(provenance: Provenance, parts: list[bytes]) -> int:
    """Write these properties; the flags that say so."""
    flags = 0
    if provenance.timestamp is not None:
        flags |= _TIMESTAMP
        parts.append(struct.pack(">Q", provenance.timestamp))
    for bit, value, what in ((_TYPE, provenance.type, "type"), (_APP_ID, provenance.app_id, "app_id")):
        if value is not None:
            flags |= bit
            parts.append(_short(value, what))
    return flags


# -- decoding -----------------------------------------------------------------------------------------------------

_STRING, _VOID, _SIGNED, _LONG, _BOOLEAN, _TABLE, _ARRAY, _FLOAT = b"SVIltFAd"
#: Tables within tables: what is read must also be written again, and handed to an executor.
_DEEPEST = 64
_TOO_DEEP = f"headers are nested more than {_DEEPEST} deep"
# Header names repeat from message to message.
_known_names: dict[bytes, str | bytes] = {}
_SHORT_PROPERTIES = (
    (_CORRELATION_ID, "correlation_id"),
    (_REPLY_TO, "reply_to"),
    (_EXPIRATION, "expiration"),
    (_MESSAGE_ID, "message_id"),
)


def text(data: bytes) -> str | bytes:
    """Text where it is UTF-8, as pika gives it; the bytes where it is not."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _read_value(data: bytes, offset: int, depth: int = 0) -> tuple[Any, int]:
    kind = data[offset]
    offset += 1
    if kind == _STRING:
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
        return text(data[offset + 4 : end]), end
    if kind == _VOID:
        return None, offset
    if kind == _SIGNED:
        return int.from_bytes(data[offset : offset + 4], "big", signed=True), offset + 4
    if kind == _LONG:  # to pika a class of its own, which marshal does not take
        return int.from_bytes(data[offset : offset + 8], "big", signed=True), offset + 8
    if kind == _BOOLEAN:
        return data[offset] != 0, offset + 1
    if kind == _TABLE:
        return _read_table(data, offset, depth + 1)
    if kind == _FLOAT:
        return _FLOAT_VALUE.unpack_from(data, offset)[0], offset + 8
    if kind == _ARRAY:
        if depth >= _DEEPEST:
            raise ValueError(_TOO_DEEP)
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
        offset += 4
        items = []
        while offset < end:
            item, offset = _read_value(data, offset, depth + 1)
            items.append(item)
        return items, end
    # The rare kinds as pika reads them.
    value, offset = pika_data.decode_value(data, offset - 1)
    return value, offset


_FLOAT_VALUE = struct.Struct(">d")


def _read_table(data: bytes, offset: int, depth: int = 0) -> tuple[dict[Any, Any], int]:
    if depth > _DEEPEST:
        raise ValueError(_TOO_DEEP)
    end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
    offset += 4
    table: dict[Any, Any] = {}
    while offset < end:
        start = offset + 1
        offset = start + data[offset]
        raw = data[start:offset]
        name = _known_names.get(raw)
        if name is None:
            name = text(raw)
            if len(_known_names) < 1000:
                _known_names[raw] = name
        kind = data[offset]
        if kind == _VOID:  # text and nothing are what a task's headers are made of
            table[name] = None
            offset += 1
        elif kind == _STRING:
            start = offset + 5
            offset = start + int.from_bytes(data[offset + 1 : start], "big")
            table[name] = text(data[start:offset])
        else:
            table[name], offset = _read_value(data, offset, depth)
    return table, end


def decode_properties(properties: Any, data: bytes, offset: int = 0) -> None:
    """Set the fields of pika's `properties` from an encoded content header. Raises for what is malformed.

    Headers that cannot be read are left out, and what follows them is read: it tells which message it was.
    """
    flags = int.from_bytes(data[offset : offset + 2], "big")
    offset += 2
    if flags & 1:
        raise ValueError("more property flags than the class basic has")
    for bit, name in ((_CONTENT_TYPE, "content_type"), (_CONTENT_ENCODING, "content_encoding")):
        if flags & bit:
            end = offset + 1 + data[offset]
            setattr(properties, name, text(data[offset + 1 : end]))
            offset = end
    if flags & _HEADERS:
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
        try:
            properties.headers, _ = _read_table(data, offset)
        except Exception:
            properties.headers = None
        offset = end
    if flags & _DELIVERY_MODE:
        properties.delivery_mode = data[offset]
        offset += 1
    if flags & _PRIORITY:
        properties.priority = data[offset]
        offset += 1
    for bit, name in _SHORT_PROPERTIES:
        if flags & bit:
            end = offset + 1 + data[offset]
            setattr(properties, name, text(data[offset + 1 : end]))
            offset = end
    # What follows (timestamp, type, user_id, app_id) the worker does not read; `decode_provenance` does.


def decode_provenance(data: bytes) -> Provenance:
    """What `decode_properties` leaves out of an encoded content header. Raises for what is malformed."""
    flags, offset = int.from_bytes(data[:2], "big"), 2
    found: dict[int, Any] = {}
    for bit, size in (*_LAYOUT, (_APP_ID, 0)):
        if not flags & bit:
            continue
        start = offset
        if bit == _HEADERS:
            offset += 4 + int.from_bytes(data[offset : offset + 4], "big")
            continue
        offset += size or 1 + data[offset]
        if bit == _TIMESTAMP:
            found[bit] = int.from_bytes(data[start:offset], "big")
        elif bit in (_TYPE, _APP_ID):
            found[bit] = text(data[start + 1 : offset])
    return Provenance(found.get(_TIMESTAMP), found.get(_TYPE), found.get(_APP_ID))


# -- passing on ---------------------------------------------------------------------------------------------------

#: Headers that mean something to the broker: where else it goes, and how often it was delivered.
_BROKER_HEADERS = (b"CC", b"BCC", b"x-delivery-count", b"x-acquired-count")


def forwarded(data: bytes) -> EncodedProperties:
    """The properties of a message that goes on to another queue: the same bytes, as a rule.

    `user_id` is left out, since the broker closes the channel when it is not the publisher's own (RabbitMQ, "Validated
    User-ID"); so are headers by which the broker would send it to other queues too, or count deliveries of the past.
    """
    flags = int.from_bytes(data[:2], "big")
    if not flags & _USER_ID and not any(bytes((len(name),)) + name in data for name in _BROKER_HEADERS):
        return EncodedProperties(data)
    parts = []
    offset = 2
    for bit, size in _LAYOUT:
        if not flags & bit:
            continue
        start = offset
        if bit == _HEADERS:
            offset += 4 + int.from_bytes(data[offset : offset + 4], "big")
            parts.append(_without_broker_headers(data, start))
            continue
        offset += size or 1 + data[offset]
        if bit != _USER_ID:
            parts.append(data[start:offset])
    return EncodedProperties(struct.pack(">H", flags & ~_USER_ID) + b"".join(parts) + data[offset:])


#: The properties before `app_id`, in their order; with their size where it is no short string's (0) or the table's.
_LAYOUT = (
    (_CONTENT_TYPE, 0), (_CONTENT_ENCODING, 0), (_HEADERS, 0), (_DELIVERY_MODE, 1), (_PRIORITY, 1),
    (_CORRELATION_ID, 0), (_REPLY_TO, 0), (_EXPIRATION, 0), (_MESSAGE_ID, 0),
    (_TIMESTAMP, 8), (_TYPE, 0), (_USER_ID, 0),
)  # fmt: skip


def _without_broker_headers(data: bytes, offset: int) -> bytes:
    """The field table at `offset` without these headers; each other one byte by byte."""
    end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
    entries = []
    position = offset + 4
    while position < end:
        start = position
        name = data[start + 1 : start + 1 + data[start]]
        try:
            position = _read_value(data, start + 1 + data[start])[1]
        except Exception:  # a kind of field that nobody knows: it goes on as it came
            return data[offset:end]
        if name not in _BROKER_HEADERS:
            entries.append(data[start:position])
    table = b"".join(entries)
    return _LENGTH.pack(len(table)) + table
