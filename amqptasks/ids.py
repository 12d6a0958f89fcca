"""Ids of tasks: UUIDs of version 4 as text, made many at a time.

One by one each costs a system call and two objects, which is more than the rest of its headers.
"""

from __future__ import annotations

import os
from collections import deque

__all__ = ["new_id"]

_BATCH = 256
#: Threads and signal handlers may take from it at once: one call of `pop` is one step.
_ready: deque[str] = deque()


def new_id() -> str:
    """A new id, as `uuid.uuid4` makes them (RFC 9562, 5.4)."""
    while True:
        try:
            return _ready.pop()
        except IndexError:
            _ready.extend(_make())


def _make() -> list[str]:
    raw = os.urandom(16 * _BATCH)
    made = []
    for start in range(0, len(raw), 16):
        text = raw[start : start + 16].hex()
        variant = "89ab"[raw[start + 8] & 3]
        made.append(f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}")
    return made


# A child must not give out its parent's.
os.register_at_fork(after_in_child=_ready.clear)
