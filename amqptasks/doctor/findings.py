"""What the doctor finds, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Level", "counted"]


class Level(StrEnum):
    """How bad it is: `error` breaks something now, `warning` will, `info` is worth knowing, `unknown` could not be
    looked at."""

    OK = "ok"
    INFO = "info"
    UNKNOWN = "unknown"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: what it is, why it matters, and the command or setting that mends it."""

    level: Level
    check: str
    what: str
    why: str = ""
    mend: str = ""


def counted(number: int, what: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
