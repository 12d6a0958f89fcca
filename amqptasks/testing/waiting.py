"""Waiting for something to become true, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["wait_until"]

T = TypeVar("T")


def wait_until(
    look: Callable[[], T], timeout: float = 10.0, what: str | Callable[[], str] = "", *, pause: float = 0.02
) -> T:
    """Call `look` until it returns something true, and return that.

    Raises `TimeoutError` naming `what` and the last value after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = look()
        if value:
            return value
        if time.monotonic() > deadline:
            text = what() if callable(what) else what
            raise TimeoutError(f"not within {timeout:g} s: {text or look!r} (last: {value!r})")
        time.sleep(pause)
