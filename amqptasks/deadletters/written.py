"""Values of a message as JSON, and back: what AMQP's tables can hold and JSON cannot keeps its type.

The form is that of `protocol.jsontypes`, ``{"__type__": name, "__value__": value}``. A table that would read as such a
value, or has a name that is not UTF-8, is written as a list of pairs.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

__all__ = ["plain", "unplain"]

_TYPE, _VALUE = "__type__", "__value__"


def _typed(name: str, value: object) -> dict[str, Any]:
    return {_TYPE: name, _VALUE: value}


def plain(value: Any) -> Any:
    """A value as JSON can have it."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _typed("float", str(value))
    if isinstance(value, Mapping):
        if _TYPE in value or not all(isinstance(name, str) for name in value):
            return _typed("table", [[plain(name), plain(item)] for name, item in value.items()])
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return _typed("datetime", value.replace(tzinfo=value.tzinfo or UTC).isoformat())
    if isinstance(value, Decimal):
        return _typed("decimal", str(value))
    if isinstance(value, bytes | bytearray):
        return _typed("base64", base64.b64encode(value).decode())
    return str(value)


def _table(pairs: Any) -> dict[Any, Any]:
    return {unplain(name): unplain(item) for name, item in pairs}


_READERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "table": _table,
    "datetime": datetime.fromisoformat,
    "decimal": Decimal,
    "base64": lambda value: base64.b64decode(value, validate=True),
}


def unplain(value: Any) -> Any:
    """What `plain` gave. Raises `ValueError` for anything else."""
    if isinstance(value, list):
        return [unplain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TYPE not in value:
        return {name: unplain(item) for name, item in value.items()}
    reader = _READERS.get(str(value[_TYPE]))
    if reader is None:
        raise ValueError(f"a value of type {value[_TYPE]!r:.40}, which no export has")
    try:
        return reader(value.get(_VALUE))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"a value of type {value[_TYPE]}: {error}") from None
