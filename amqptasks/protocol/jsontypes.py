"""JSON with Celery's extra types, so that dates, decimals and UUIDs survive the wire.

Celery (kombu) writes them as ``{"__type__": name, "__value__": value}``. What has a plain JSON form of its own
(pydantic models, dataclasses, enums, sets) is written as that, and read back through the task's annotations.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

import orjson
from pydantic import BaseModel

from amqptasks.errors import DecodeError

__all__ = ["MAX_DEPTH", "dumps", "loads"]

#: Deeper nesting is refused: neither a call nor a worker may recurse without bound.
MAX_DEPTH = 512

_MARK = b'"__type__"'


def _typed(name: str, value: Any) -> dict[str, Any]:
    return {"__type__": name, "__value__": value}


def _default(value: Any) -> Any:
    match value:
        case BaseModel():
            return value.model_dump(mode="python")
        case datetime():
            return _typed("datetime", value.isoformat())
        case date():
            return _typed("date", value.isoformat())
        case time():
            return _typed("time", value.isoformat())
        case Decimal():
            return _typed("decimal", str(value))
        case UUID():
            return _typed("uuid", {"hex": value.hex})
        case Enum():
            return value.value
        case bytes() | bytearray() | memoryview():
            return _typed("base64", base64.b64encode(bytes(value)).decode())
        case set() | frozenset():
            return list(value)
        case PurePath():
            return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is not JSON serializable")


# One encoder for the process: `json.dumps` with arguments would build one a call. NaN is refused: it is no JSON.
_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_default, check_circular=True
).encode

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "datetime": datetime.fromisoformat,
    "date": lambda value: datetime.fromisoformat(value).date(),
    "time": time.fromisoformat,
    "decimal": Decimal,
    "uuid": lambda value: UUID(**value) if isinstance(value, dict) else UUID(value),
    "bytes": lambda value: value.encode(),
    "base64": base64.b64decode,
}


def dumps(value: Any) -> bytes:
    """`value` as UTF-8 JSON. Raises `TypeError`, `ValueError` or `RecursionError` for what cannot be written."""
    return _encode(value).encode()


def loads(body: bytes) -> Any:
    """The value of UTF-8 JSON. Raises `DecodeError`, also for nesting deeper than the parser bears."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise DecodeError(f"not JSON: {error}") from None
    # Few messages carry extra types; the walk in Python is for these alone.
    return _restore(value, 0) if _MARK in body else value


def _restore(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise DecodeError(f"JSON nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_restore(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 2 and "__type__" in value and "__value__" in value:
        decoder = _DECODERS.get(value["__type__"]) if isinstance(value["__type__"], str) else None
        if decoder is None:
            raise DecodeError(f"JSON type {value['__type__']!r} is not known")
        try:
            return decoder(value["__value__"])
        except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
            raise DecodeError(f"JSON type {value['__type__']}: {error}") from None
    return {key: _restore(item, depth + 1) for key, item in value.items()}
