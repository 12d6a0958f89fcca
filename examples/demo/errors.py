"""The demo's own errors."""

from __future__ import annotations

__all__ = ["DemoError", "Interrupted"]


class DemoError(Exception):
    """The demo cannot go on. The message is for people and says what to do."""


class Interrupted(BaseException):
    """Ctrl-C or a signal: clean up and end. No `Exception`, so that nothing takes it for a failure."""
