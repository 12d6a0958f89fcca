"""Values of Celery's settings as YAML has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

__all__ = ["literal", "plain", "seconds"]


def seconds(value: Any) -> float | int:
    """Seconds of a number or a timedelta: a whole number where it is one."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    return int(number) if number == int(number) else float(number)


def plain(value: Any) -> Any:
    """A value that YAML can write: durations are seconds, tuples lists."""
    if isinstance(value, timedelta):
        return seconds(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def literal(name: str) -> str:
    """A glob that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
