"""Durations, sizes and rates as people write them. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

__all__ = ["parse_bytes", "parse_rate", "parse_seconds", "rate_text"]

_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
#: ``MB`` and Kubernetes' ``M`` are decimal, ``MiB`` and ``Mi`` binary.
_BYTES = {
    "": 1,
    "b": 1,
    **{f"{unit}{end}": 1000**power for power, unit in enumerate("kmgt", 1) for end in ("", "b")},
    **{f"{unit}i{end}": 1024**power for power, unit in enumerate("kmgt", 1) for end in ("", "b")},
}
_RATE = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parts(text: str) -> list[tuple[float, str]]:
    """``1h30m`` as ``[(1.0, "h"), (30.0, "m")]``; empty when it is something else."""
    parts = []
    position = 0
    text = text.strip()
    while position < len(text):
        found = _PART.match(text, position)
        if found is None:
            return []
        parts.append((float(found[1]), found[2].lower()))
        position = found.end()
    return parts


def _sum(parts: list[tuple[float, str]], units: Mapping[str, float]) -> float | None:
    if not parts or any(unit not in units for _, unit in parts):
        return None
    if len(parts) > 1 and any(not unit for _, unit in parts):
        return None  # "1 000" or "1h30": is that 30 minutes or seconds?
    return sum(number * units[unit] for number, unit in parts)


def parse_seconds(value: object) -> float:
    """Seconds of ``300``, ``30s``, ``5m``, ``1h30m``, ``14d``. Raises ValueError."""
    if isinstance(value, int | float) and _is_number(value):
        return float(value)
    seconds = _sum(_parts(value), _SECONDS) if isinstance(value, str) else None
    if seconds is None:
        raise ValueError(f"{value!r} is not a duration; write seconds, or 30s, 5m, 1h, 14d")
    return seconds


def parse_bytes(value: object) -> int:
    """Bytes of ``1048576``, ``300MB``, ``64MiB``, ``64Mi``. Raises ValueError."""
    if isinstance(value, int | float) and _is_number(value) and math.isfinite(value):
        return int(value)
    parts = _parts(value) if isinstance(value, str) else []
    size = _sum(parts, _BYTES) if len(parts) == 1 else None
    if size is None:
        raise ValueError(f"{value!r} is not a size; write bytes, or 300MB, 64MiB, 1GB")
    return int(size)


def parse_rate(value: object) -> float:
    """Tasks per second of ``10/m``, ``5/s``, ``100/h``, or a number a second; 0 for no limit. Raises ValueError."""
    number, unit = 0.0, "s"
    if isinstance(value, int | float) and _is_number(value):
        number = float(value)
    elif isinstance(value, str):
        count, slash, name = value.partition("/")
        unit = name.strip() if slash else "s"
        try:
            number = float(count)
        except ValueError:
            number = -1.0
    else:
        number = -1.0
    if not (math.isfinite(number) and number >= 0) or unit not in _RATE:
        raise ValueError(f"{value!r} is not a rate; write 10/m, 5/s or 100/h")
    return number / _RATE[unit]


def rate_text(value: object) -> object:
    """A rate as text: YAML's ``10`` is ``10/s``, as Celery reads it. Raises ValueError for what is no rate."""
    parse_rate(value)
    return value.replace(" ", "") if isinstance(value, str) else f"{value}/s"
