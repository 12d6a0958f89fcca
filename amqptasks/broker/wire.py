"""Content headers of AMQP 0-9-1, encoded once and fast.

pika encodes a message's header table when it sends it, on the I/O thread, and knows no floating-point field. Here it
happens in the caller, where an error belongs, in about half the time, and Celery's time limits (floats) pass.
"""

from __future__ import annotations

import struct
from datetime import datetime
from decimal import Decimal
from typing import Any

from amqptasks.errors import SerializationError
from amqptasks.message import Envelope

__all__ = ["EncodedProperties", "encode_properties", "encode_table"]

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
