"""What every command gets: the global flags."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CliContext"]


@dataclass(frozen=True, slots=True)
class CliContext:
    """The global flags."""

    app: str | None = None
    config: str | None = None
    broker: str | None = None
    verbose: bool = False
