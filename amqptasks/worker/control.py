"""What supervisor and leader say to each other over their socket pair, a byte each."""

from __future__ import annotations

__all__ = ["Command", "News"]


class Command:
    """What the supervisor tells a leader, a byte each."""

    DRAIN = b"D"
    STOP = b"S"


class News:
    """What a leader tells the supervisor, a byte each."""

    READY = b"R"
    TOPOLOGY_MISSING = b"T"
