"""Durations, sizes and rates as people write them. Pure."""

from __future__ import annotations

import re

__all__ = ["parse_bytes", "parse_rate", "parse_seconds"]

_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
}
_RATE = {"s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def _parse(value: object, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value)
        if found is not None and found[2].lower() in units:
            return float(found[1]) * units[found[2].lower()]
    raise ValueError(f"{value!r} is not {what}; write {example}")


def parse_seconds(value: object) -> float:
    """Seconds of ``300``, ``30s``, ``5m``, ``1h``, ``14d``. Raises ValueError."""
    return _parse(value, _SECONDS, "a duration", "seconds, or 30s, 5m, 1h, 14d")


def parse_bytes(value: object) -> int:
    """Bytes of ``1048576``, ``300MB``, ``64MiB``. Raises ValueError."""
    return int(_parse(value, _BYTES, "a size", "bytes, or 300MB, 64MiB, 1GB"))


def parse_rate(value: object) -> float:
    """Tasks per second of ``10/m``, ``5/s``, ``100/h``, or a number a second. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    if isinstance(value, str):
        count, slash, unit = value.partition("/")
        try:
            number = float(count)
        except ValueError:
            number = 0.0
        if number > 0 and (not slash or unit.strip() in _RATE):
            return number / _RATE[unit.strip()] if slash else number
    raise ValueError(f"{value!r} is not a rate; write 10/m, 5/s or 100/h")
