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
from amqptasks.message import Envelope

__all__ = ["EncodedProperties", "decode_properties", "encode_properties", "encode_table"]

_LONG_LONG = struct.Struct(">cq")
_INT = struct.Struct(">ci")
_DOUBLE = struct.Struct(">cd")
_LENGTH = struct.Struct(">I")
_SHORTEST, _LONGEST = -(2**31), 2**31 - 1
_MOST = 2**63 - 1

# Bits of the property flags (AMQP 0-9-1, class basic).
_CONTENT_TYPE, _CONTENT_ENCODING, _HEADERS, _DELIVERY_MODE = 1 << 15, 1 << 14, 1 << 13, 1 << 12
_PRIORITY, _CORRELATION_ID, _REPLY_TO, _EXPIRATION, _MESSAGE_ID = 1 << 11, 1 << 10, 1 << 9, 1 << 8, 1 << 7


class EncodedProperties:
    """Properties as pika's frames want them: an object with `INDEX` and `encode()`."""

    INDEX = 60  # class basic
    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def encode(self) -> list[bytes]:
        """The encoded properties, in one piece."""
        return [self._data]


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
        if abs(value) <= _MOST:
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
    return EncodedProperties(struct.pack(">H", flags) + b"".join(parts))


# -- decoding -----------------------------------------------------------------------------------------------------

_STRING, _VOID, _SIGNED, _BOOLEAN, _TABLE, _ARRAY, _FLOAT = b"SVItFAd"
# Header names repeat from message to message.
_known_names: dict[bytes, str | bytes] = {}
_SHORT_PROPERTIES = (
    (_CORRELATION_ID, "correlation_id"),
    (_REPLY_TO, "reply_to"),
    (_EXPIRATION, "expiration"),
    (_MESSAGE_ID, "message_id"),
)


def _text(data: bytes) -> str | bytes:
    """Text where it is UTF-8, as pika gives it; the bytes where it is not."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _read_value(data: bytes, offset: int) -> tuple[Any, int]:
    kind = data[offset]
    offset += 1
    if kind == _STRING:
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
        return _text(data[offset + 4 : end]), end
    if kind == _VOID:
        return None, offset
    if kind == _SIGNED:
        return int.from_bytes(data[offset : offset + 4], "big", signed=True), offset + 4
    if kind == _BOOLEAN:
        return data[offset] != 0, offset + 1
    if kind == _TABLE:
        return _read_table(data, offset)
    if kind == _FLOAT:
        return _FLOAT_VALUE.unpack_from(data, offset)[0], offset + 8
    if kind == _ARRAY:
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
        offset += 4
        items = []
        while offset < end:
            item, offset = _read_value(data, offset)
            items.append(item)
        return items, end
    # The rare kinds as pika reads them.
    value, offset = pika_data.decode_value(data, offset - 1)
    return value, offset


_FLOAT_VALUE = struct.Struct(">d")


def _read_table(data: bytes, offset: int) -> tuple[dict[Any, Any], int]:
    end = offset + 4 + int.from_bytes(data[offset : offset + 4], "big")
    offset += 4
    table: dict[Any, Any] = {}
    while offset < end:
        start = offset + 1
        offset = start + data[offset]
        raw = data[start:offset]
        name = _known_names.get(raw)
        if name is None:
            name = _text(raw)
            if len(_known_names) < 1000:
                _known_names[raw] = name
        kind = data[offset]
        if kind == _VOID:  # text and nothing are what a task's headers are made of
            table[name] = None
            offset += 1
        elif kind == _STRING:
            start = offset + 5
            offset = start + int.from_bytes(data[offset + 1 : start], "big")
            table[name] = _text(data[start:offset])
        else:
            table[name], offset = _read_value(data, offset)
    return table, end


def decode_properties(properties: Any, data: bytes, offset: int = 0) -> None:
    """Set the fields of pika's `properties` from an encoded content header. Raises for what is malformed."""
    flags = int.from_bytes(data[offset : offset + 2], "big")
    offset += 2
    if flags & 1:
        raise ValueError("more property flags than the class basic has")
    for bit, name in ((_CONTENT_TYPE, "content_type"), (_CONTENT_ENCODING, "content_encoding")):
        if flags & bit:
            end = offset + 1 + data[offset]
            setattr(properties, name, _text(data[offset + 1 : end]))
            offset = end
    if flags & _HEADERS:
        properties.headers, offset = _read_table(data, offset)
    if flags & _DELIVERY_MODE:
        properties.delivery_mode = data[offset]
        offset += 1
    if flags & _PRIORITY:
        properties.priority = data[offset]
        offset += 1
    for bit, name in _SHORT_PROPERTIES:
        if flags & bit:
            end = offset + 1 + data[offset]
            setattr(properties, name, _text(data[offset + 1 : end]))
            offset = end
    # What follows (timestamp, type, user_id, app_id) the worker does not read.
